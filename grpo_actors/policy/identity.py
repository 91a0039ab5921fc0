"""The identity of a process's base model. Two processes of one run compare theirs before anything else.

Depends on weights and a vocabulary only, not on where they were loaded from. The adapter is not part of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import mlx.core as mx
import numpy as np
import xxhash
from mlx import nn
from mlx.utils import tree_flatten

#: Number of values of each tensor that are hashed, from its beginning.
_SAMPLE = 256


@dataclass(frozen=True, slots=True)
class Identity:
    """The data that two processes compare to be sure that they hold the same base model."""

    name: str
    architecture: str
    parameters: int
    #: Hash of tensor names, shapes and some values: two fine-tunes of one model differ.
    weights: str
    #: Hash of the vocabulary.
    tokenizer: str

    def mismatch(self, other: "Identity") -> str | None:
        """Return which part differs, in words; None if the models are the same."""
        mine, theirs = asdict(self), asdict(other)
        for part in ("architecture", "parameters", "tokenizer", "weights"):
            if mine[part] != theirs[part]:
                return f"{part} is {mine[part]} here, {theirs[part]} there"
        return None


def identify(name: str, architecture: str, model: nn.Module, vocabulary: Mapping[str, int]) -> Identity:
    """Return the identity of the base model in `model`; an adapter on it makes no difference."""
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
    """Yield the names and arrays of the base: an adapter wraps modules, which changes names, and adds arrays."""
    wrappers = {name for name, module in model.named_modules() if "lora_a" in module}
    for key, array in tree_flatten(model.parameters()):
        owner, _, leaf = key.rpartition(".")
        wrapper = owner.rpartition(".")[0]
        if owner not in wrappers:
            yield (f"{wrapper}.{leaf}" if wrapper in wrappers else key), array
