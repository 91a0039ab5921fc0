"""Which base model a process holds: two that work on one run compare this before anything else.

Knows weights and a vocabulary; refuses to know where they were loaded from. An adapter is no part of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import mlx.core as mx
import numpy as np
import xxhash
from mlx import nn
from mlx.utils import tree_flatten

#: Values of each tensor that are looked at, from its beginning.
_SAMPLE = 256


@dataclass(frozen=True, slots=True)
class Identity:
    """What two processes compare to be sure that they hold the same base model."""

    name: str
    architecture: str
    parameters: int
    #: Of tensor names, shapes and some values: two fine-tunes of one model differ.
    weights: str
    #: Of the vocabulary.
    tokenizer: str

    def mismatch(self, other: "Identity") -> str | None:
        """Which part differs, in words; None: the same model."""
        mine, theirs = asdict(self), asdict(other)
        for part in ("architecture", "parameters", "tokenizer", "weights"):
            if mine[part] != theirs[part]:
                return f"{part} is {mine[part]} here, {theirs[part]} there"
        return None


def identify(name: str, architecture: str, model: nn.Module, vocabulary: Mapping[str, int]) -> Identity:
    """The identity of the base model in `model`, whatever adapter it carries."""
    base = sorted(_base_parameters(model), key=lambda item: item[0])
    weights = xxhash.xxh3_64()
    for key, array in base:
        head = array.reshape(-1)[:_SAMPLE]
        # NumPy has no bfloat16; float32 holds every half-precision value exactly.
        values = head.astype(mx.float32) if mx.issubdtype(head.dtype, mx.floating) else head
        weights.update(f"{key}{array.shape}".encode())
        weights.update(np.array(values).tobytes())
    return Identity(
        name=name,
        architecture=architecture,
        parameters=sum(array.size for _, array in base),
        weights=weights.hexdigest(),
        tokenizer=xxhash.xxh3_64_hexdigest(json.dumps(sorted(vocabulary.items())).encode()),
    )


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """Names and arrays as they are without an adapter, which wraps a module and adds arrays of its own."""
    wrappers = {name for name, module in model.named_modules() if "lora_a" in module}
    for key, array in tree_flatten(model.parameters()):
        owner, _, leaf = key.rpartition(".")
        wrapper = owner.rpartition(".")[0]
        if owner not in wrappers:
            yield (f"{wrapper}.{leaf}" if wrapper in wrappers else key), array
