"""The identity of a process's base model. Two processes of one run compare theirs before anything else.

Depends on weights and a vocabulary only, not on where they were loaded from. The adapter is not part of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod

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


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The part of one array of a model that its identity is made of."""

    shape: tuple[int, ...]
    #: Its first values, as a flat array.
    values: mx.array


def excerpts_of(model: nn.Module) -> dict[str, Excerpt]:
    """Return excerpts of the base model in `model` by name, lazily; an adapter on it makes no difference."""
    return {key: Excerpt(array.shape, _head(array)) for key, array in _base_parameters(model)}


def identify(
    name: str, architecture: str, excerpts: Mapping[str, Excerpt], vocabulary: Mapping[str, int]
) -> Identity:
    """Return the identity of a base model, given excerpts of it."""
    mx.eval(
        [excerpt.values for excerpt in excerpts.values()]
    )  # all at once, instead of a wait for each of hundreds
    weights = xxhash.xxh3_64()
    for key, excerpt in sorted(excerpts.items()):
        weights.update(f"{key}{excerpt.shape}".encode())
        weights.update(np.array(excerpt.values).tobytes())
    return Identity(
        name=name,
        architecture=architecture,
        parameters=sum(prod(excerpt.shape) for excerpt in excerpts.values()),
        weights=weights.hexdigest(),
        tokenizer=_vocabulary_hash(vocabulary),
    )


def _vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """Return the hash of texts and ids, in the order of the ids: sorting 150,000 pairs would take three times as long."""
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    digest = xxhash.xxh3_64(json.dumps(texts).encode())
    digest.update(np.fromiter(map(vocabulary.__getitem__, texts), np.int64, len(texts)).tobytes())
    return digest.hexdigest()


def _head(array: mx.array) -> mx.array:
    """Return the first values of an array in a type that NumPy has: float32 holds every half-precision value exactly."""
    # A copy: a slice would hold all of the array.
    head = mx.contiguous(array.reshape(-1)[:_SAMPLE])
    return head.astype(mx.float32) if mx.issubdtype(head.dtype, mx.floating) else head


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """Yield the names and arrays of the base: an adapter wraps modules, which changes names, and adds arrays."""
    wrappers = {name for name, module in model.named_modules() if "lora_a" in module}
    for key, array in tree_flatten(model.parameters()):
        owner, _, leaf = key.rpartition(".")
        wrapper = owner.rpartition(".")[0]
        if owner not in wrappers:
            yield (f"{wrapper}.{leaf}" if wrapper in wrappers else key), array
