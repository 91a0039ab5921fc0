"""The sizes of one model in a GGUF file, and the type of its arrays."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one model; `axes` gives the length of each axis that a tensor can have."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def axes(self) -> Mapping[str, int]:
        """Axis name -> length, in weights."""
        return {
            "hidden": self.hidden,
            "inner": self.inner,
            "query": self.heads * self.head_dim,
            "key": self.kv_heads * self.head_dim,
            "head": self.head_dim,
            "vocab": self.vocab,
        }
