"""The cache of a batch whose rows begin together: mlx-lm's own, for models that no `window` holds.

Sliding windows, convolutions and state spaces keep more, or less, than the keys and values of every
position. No row can be added to them while others are under way.

Knows rows and prompts; refuses to know samples.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, make_prompt_cache

from grpo_actors.policy.decoding.draw import Array
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.rows import Group
from grpo_actors.policy.model import Policy, same_logits


class FixedBatch:
    """The caches of a model's layers; used like a `window.Window`, but filled once."""

    def __init__(self, layers: list[Any]) -> None:
        """`layers`: mlx-lm's caches, as `prefill` returns them; none before the batch begins."""
        self.layers = layers

    def place(self, rows: Array, prompts: "FixedBatch", chosen: Array) -> None:
        """Begin: row i goes on from row `chosen[i]` of `prompts`, which is used up."""
        assert not self.layers
        assert np.array_equal(rows, np.arange(len(chosen)))
        self.layers = prompts.layers
        self.keep(chosen)

    def keep(self, rows: Array) -> None:
        """Go on with these rows alone, in this order."""
        _take_rows(self.layers, mx.array(rows))

    def free(self, row: int) -> None:
        """Do nothing: the row is computed along until `keep` leaves it out."""

    def reserve(self) -> None:
        """Do nothing: mlx-lm's caches grow by themselves."""

    def advance(self) -> None:
        """Do nothing: mlx-lm's caches count by themselves."""


def next_batch(policy: Policy, waiting: Iterable[Group], places: int) -> list[Group]:
    """The first of the waiting groups, at least one, that have a place and may share a batch."""
    batch: list[Group] = []
    completions = 0
    for group in waiting:
        completions += len(group.seeds)
        if batch and completions > places:
            break
        batch.append(group)
    return batch if _fit_one_batch(policy, [group.prompt for group in batch]) else batch[:1]


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Run all prompts, but for their last tokens, through the model once; returns its caches, one row a prompt."""
    cache: list[Any] = make_prompt_cache(model)
    lengths = [len(prompt) - 1 for prompt in prompts]
    columns = max(lengths)
    if min(lengths) < columns:
        columns = max(2, columns)  # a rotating cache takes one column for a step of decoding
        cache = [layer.merge([layer] * len(prompts)) for layer in cache]
        for layer in cache:
            # Fed with padding on the right, which `finalize` rolls to the left and masks.
            layer.prepare(lengths=lengths, right_padding=[columns - length for length in lengths])
    if columns:
        padded = np.zeros((len(prompts), columns), dtype=np.int32)
        for row, prompt, length in zip(padded, prompts, lengths, strict=True):
            row[:length] = prompt[:-1]
        # The logits are never computed, as MLX is lazy.
        model(mx.array(padded), cache=cache)
    if min(lengths) < columns:
        for layer in cache:
            layer.finalize()
    return cache


def _fit_one_batch(policy: Policy, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the model answers these prompts side by side as it would one by one.

    Prompts of one length always; others only where the model respects padding. Some recurrent ones do not:
    mlx-lm's mamba takes padding for text, and nothing fails. So the first ragged batch is tried out.
    """
    if len({len(prompt) for prompt in prompts}) <= 1:
        return True
    found = findings(policy)
    if found.respects_padding is None:
        found.respects_padding = _respects_padding(policy.model, max(prompts, key=len))
    return found.respects_padding


def _respects_padding(model: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt's beginning gives the same logits beside the whole prompt as alone."""
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model)):
        return False
    beginning = prompt[: max(1, len(prompt) // 4)]
    return same_logits(_logits(model, [prompt, beginning])[1], _logits(model, [beginning])[0])


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> mx.array:
    """Of the first new token of each prompt, [P, V]."""
    last = mx.array([[prompt[-1]] for prompt in prompts])
    logits: mx.array = model(last, cache=prefill(model, prompts))[:, -1]
    return logits


def _take_rows(cache: Iterable[Any], rows: mx.array) -> None:
    """Keep (or repeat) these rows of a cache, in place."""
    for layer in cache:
        if isinstance(layer, CacheList):
            _take_rows(layer.caches, rows)
        elif hasattr(layer, "filter"):
            layer.filter(rows)
        elif layer.keys is not None:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
