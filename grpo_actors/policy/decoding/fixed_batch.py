"""The cache of a batch whose rows begin together: mlx-lm's own, for models whose cache does not fit a `window`.

Convolutions, state spaces and indexes of tokens keep something else than keys and values of positions. No row can be added
to them while others are under way.

Depends on rows and prompts, not on samples.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import CacheList, make_prompt_cache

from grpo_actors.policy.decoding.draw import Array
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.rows import Group
from grpo_actors.policy.model import RAGGED, Policy, deviation, logits_alone
from grpo_actors.policy.recurrent_layers import for_whole_texts

#: Tokens at the end of each text in `RAGGED` that are decoded one by one.
RAGGED_STEPS = 3


class FixedBatch:
    """The caches of a model's layers, with the interface of `window.Window`; they are filled once."""

    def __init__(self, layers: list[Any]) -> None:
        """`layers` are mlx-lm's caches, as `prefill` returns them; empty before the batch begins."""
        self.layers = layers

    def place(self, rows: Array, prompts: "FixedBatch", chosen: Array) -> None:
        """Begin the batch: row i continues from row `chosen[i]` of `prompts`, whose caches are taken over."""
        assert not self.layers
        assert np.array_equal(rows, np.arange(len(chosen)))
        self.layers = prompts.layers
        self.keep(chosen)

    def keep(self, rows: Array) -> None:
        """Keep only these rows, in this order."""
        _take_rows(self.layers, mx.array(rows))

    def free(self, row: int) -> None:
        """Do nothing: the row is computed with the others until `keep` drops it."""

    def reserve(self) -> None:
        """Do nothing: mlx-lm's caches grow by themselves."""

    def advance(self) -> None:
        """Do nothing: mlx-lm's caches count by themselves."""


def next_batch(policy: Policy, waiting: Iterable[Group], max_rows: int) -> list[Group]:
    """Return the first waiting groups that fit into `max_rows` rows and may share a batch; at least one group.

    If prompts of different lengths may not, it ends where the length changes.
    """
    batch: list[Group] = []
    completions = 0
    for group in waiting:
        completions += len(group.seeds)
        if batch and completions > max_rows:
            break
        batch.append(group)
    if _fit_one_batch(policy, [group.prompt for group in batch]):
        return batch
    length = len(batch[0].prompt)
    return list(takewhile(lambda group: len(group.prompt) == length, batch))


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Run all prompts without their last tokens through the model once; return its caches, one row per prompt."""
    cache: list[Any] = make_prompt_cache(model)
    lengths = [len(prompt) - 1 for prompt in prompts]
    columns = max(lengths)
    if min(lengths) < columns:
        columns = max(2, columns)  # a rotating cache would treat a single column as a decoding step
        cache = [layer.merge([layer] * len(prompts)) for layer in cache]
        for layer in cache:
            # The padding is on the right; `finalize` rolls it to the left and masks it.
            layer.prepare(lengths=lengths, right_padding=[columns - length for length in lengths])
    if columns:
        padded = np.zeros((len(prompts), columns), dtype=np.int32)
        for row, prompt, length in zip(padded, prompts, lengths, strict=True):
            row[:length] = prompt[:-1]
        # MLX is lazy, so the logits are never computed.
        with for_whole_texts(model):
            model(mx.array(padded), cache=cache)
    if min(lengths) < columns:
        for layer in cache:
            layer.finalize()
    return cache


def _fit_one_batch(policy: Policy, prompts: Sequence[Sequence[int]]) -> bool:
    """Return whether the model gives these prompts the same results side by side as one by one.

    With prompts of equal length it always does, otherwise only if it respects padding, in its prompts and in the steps that
    follow. Some models do not: mlx-lm's mamba takes padding for text, without any error, and its gemma2 raises one.
    """
    return len({len(prompt) for prompt in prompts}) <= 1 or respects_padding(policy)


def respects_padding(policy: Policy) -> bool:
    """Return whether prompts of different lengths can share a fixed batch; the first call tries it."""
    found = findings(policy)
    if found.respects_padding is None:
        found.respects_padding = _decodes_ragged_rows(policy.model)
    return found.respects_padding


def _decodes_ragged_rows(model: Any) -> bool:
    """Return whether the texts `RAGGED`, decoded side by side, give the logits of each text alone, up to rounding.

    Rounding is what one text shows that is decoded alone. It hides no error of a few percent, as a fixed bound in half
    precision would.
    """
    try:
        if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model)):
            return False
        with _without_zeros(model):
            return _decoded_deviation(model, RAGGED) <= 4 * _decoded_deviation(model, RAGGED[:1]) + 0.005
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError):
        return False


@contextlib.contextmanager
def _without_zeros(model: Any) -> Iterator[None]:
    """Give small random values, within the block, to arrays that are all zero.

    Zeros hide what they multiply until they are trained: a convolution of Baichuan M1 that begins as zeros ignores the
    state that padding has spoiled.
    """
    # One at a time: `any` makes a copy of an array as booleans.
    held = [
        (name, array)
        for name, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating) and not mx.any(array).item()
    ]
    filled = [
        (name, 0.1 * mx.random.normal(array.shape, array.dtype, key=mx.random.key(i)))
        for i, (name, array) in enumerate(held)
    ]
    model.update(tree_unflatten(filled))
    try:
        yield
    finally:
        model.update(tree_unflatten(held))


def _decoded_deviation(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """Decode the last `RAGGED_STEPS` tokens of each text side by side; return the largest deviation from whole texts."""
    prompts = [text[:-RAGGED_STEPS] for text in texts]
    cache, alone = prefill(model, prompts), logits_alone(model, texts)
    deviations = []
    for step in range(RAGGED_STEPS):
        at = [len(prompt) - 1 + step for prompt in prompts]
        fed = mx.array([[text[column]] for text, column in zip(texts, at, strict=True)])
        logits = model(fed, cache=cache)[:, -1]
        deviations += [deviation(logits[row], alone[row, column]) for row, column in enumerate(at)]
    return max(deviations)


def _take_rows(cache: Iterable[Any], rows: mx.array) -> None:
    """Select rows of a cache in place; a row may occur more than once."""
    for layer in cache:
        if isinstance(layer, CacheList):
            _take_rows(layer.caches, rows)
        elif hasattr(layer, "filter"):
            layer.filter(rows)
        elif layer.keys is not None:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
