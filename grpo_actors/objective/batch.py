"""Ragged completions of one update, packed into micro-batches of right-padded arrays.

Knows token ids, log-probs and advantages as numbers on the host; refuses to know how they came about.
Every token carries its weight in the loss of the whole update (`aggregation`), so that the gradients of the
micro-batches just add up. Deterministic: the same completions in the same order give the same arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.objective.aggregation import token_weights

Array = np.ndarray[Any, np.dtype[Any]]

#: Rows, and columns of a micro-batch, are padded up to multiples of these: few shapes are compiled.
ROW_MULTIPLE = 4
TOKEN_MULTIPLE = 32
COMPLETION_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion with what the loss needs of it."""

    prompt_ids: Sequence[int]  # at least one: its last token predicts the first of the completion
    completion_ids: Sequence[int]  # stop token included
    behaviour_logprobs: Sequence[float]  # log μ of each completion token, nats, as recorded by the worker
    advantage: float
    valid: bool = True  # False: no valid reward, so masked
    truncated: bool = False  # hit max_new_tokens without a stop


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N rows, some of them padding; T tokens of prompt and completion, C of a completion."""

    tokens: Array  # [N, T] int32, prompt then completion then padding
    start: Array  # [N] int32: place of the last prompt token, whose logits predict targets[:, 0]
    targets: Array  # [N, C] int32, the completion's tokens
    mask: Array  # [N, C] bool, completion tokens that train
    behaviour_logprobs: Array  # [N, C] float32, 0 where masked
    advantages: Array  # [N] float32
    token_weights: Array  # [N, C] float32, 0 where masked
    index: Array  # [N] int64: which of the packed completions a row is, −1 for a row of padding

    @property
    def positions(self) -> Array:
        """[N, C] int32: the place in `tokens` whose logits predict each target, kept below T.

        Padding columns of a row may point past its tokens: gathering without the bound reads at random.
        """
        places = self.start[:, None] + np.arange(self.targets.shape[1], dtype=np.int32)
        return np.asarray(np.minimum(places, self.tokens.shape[1] - 1))

    def arrays(self) -> dict[str, mx.array]:
        """All but `index`, by name, as MLX arrays; what `objective_loss` and the model read."""
        names = ("tokens", "start", "targets", "mask", "behaviour_logprobs", "advantages", "token_weights")
        return {name: mx.array(getattr(self, name)) for name in names}


@dataclass(frozen=True, slots=True)
class Update:
    """The micro-batches of one optimizer update, longest first, and what was packed into them."""

    micro_batches: tuple[MicroBatch, ...]  # none if every completion is masked: there is nothing to learn
    completions: int  # all that were given
    active: int  # of them, those whose tokens have weight in the loss
    active_tokens: int  # completion tokens of the active ones, also of those skipped for A = 0
    tokens: int  # prompt and completion tokens computed, padding left out
    padding_share: float  # of all N · T places computed, those that hold no token


def pack(
    completions: Sequence[Completion],
    *,
    rows: int,
    aggregation: str,
    max_new_tokens: int,
    mask_truncated: bool = False,
    skip_zero_advantage: bool = False,
    row_multiple: int = ROW_MULTIPLE,
    token_multiple: int = TOKEN_MULTIPLE,
    completion_multiple: int = COMPLETION_MULTIPLE,
) -> Update:
    """Cut one update into micro-batches.

    Masked completions (invalid, empty, or truncated under `mask_truncated`) are never computed; they count
    in the denominators as the aggregation says. The rest is sorted by length and dealt in runs, longest
    first: neighbours pad each other little, and a micro-batch that does not fit in memory fails at once.

    Args:
        completions: All of the update, of all groups and all ranks: a rank then takes every n-th micro-batch.
        rows: Most completions in a micro-batch.
        aggregation: A key of `AGGREGATIONS`.
        max_new_tokens: L_max, tokens.
        mask_truncated: Leave out completions that hit the limit.
        skip_zero_advantage: Do not compute completions with A = 0 either. The gradient is the same as long
            as neither KL nor entropy is in the loss; the statistics then speak of the others alone.
        row_multiple: N is a multiple of this, or `rows` where that is smaller; `rows` gives one N for all.
        token_multiple: T is a multiple of this.
        completion_multiple: C is a multiple of this.

    Raises:
        ValueError: A completion's ids and log-probs differ in number, or its prompt is empty.
    """
    _check(completions)
    masked = [not c.valid or (mask_truncated and c.truncated) for c in completions]
    lengths = np.array(
        [0 if m else len(c.completion_ids) for c, m in zip(completions, masked, strict=True)], int
    )
    weights = token_weights(aggregation, lengths, max_new_tokens=max_new_tokens)
    kept = [
        i
        for i, c in enumerate(completions)
        if lengths[i] and not (skip_zero_advantage and c.advantage == 0.0)
    ]
    kept.sort(key=lambda i: (-len(completions[i].prompt_ids) - lengths[i], -lengths[i], i))
    multiples = (row_multiple, token_multiple, completion_multiple)
    runs = [kept[first : first + rows] for first in range(0, len(kept), rows)]
    micro_batches = [
        _micro_batch(completions, run, weights, _shape(completions, run, rows, multiples)) for run in runs
    ]
    places = sum(m.tokens.size for m in micro_batches)
    filled = sum(len(completions[i].prompt_ids) + int(lengths[i]) for i in kept)
    return Update(
        micro_batches=tuple(micro_batches),
        completions=len(completions),
        active=int(np.count_nonzero(lengths)),
        active_tokens=int(lengths.sum()),
        tokens=filled,
        padding_share=1.0 - filled / places if places else 0.0,
    )


def _check(completions: Sequence[Completion]) -> None:
    for i, c in enumerate(completions):
        if len(c.prompt_ids) == 0:
            raise ValueError(f"completion {i}: the prompt must have a token, got none")
        if len(c.completion_ids) != len(c.behaviour_logprobs):
            raise ValueError(
                f"completion {i}: every token needs one behaviour log-prob, "
                f"got {len(c.completion_ids)} tokens and {len(c.behaviour_logprobs)} log-probs"
            )


def _shape(
    completions: Sequence[Completion], chosen: Sequence[int], rows: int, multiples: tuple[int, int, int]
) -> tuple[int, int, int]:
    """(N, T, C) that hold the chosen, padded up."""
    C = max(len(completions[i].completion_ids) for i in chosen)
    T = max(len(completions[i].prompt_ids) + len(completions[i].completion_ids) for i in chosen)
    return (min(_ceil(len(chosen), multiples[0]), rows), _ceil(T, multiples[1]), _ceil(C, multiples[2]))


def _micro_batch(
    completions: Sequence[Completion], chosen: Sequence[int], weights: Array, shape: tuple[int, int, int]
) -> MicroBatch:
    N, T, C = shape
    batch = MicroBatch(
        tokens=np.zeros((N, T), np.int32),
        start=np.zeros(N, np.int32),
        targets=np.zeros((N, C), np.int32),
        mask=np.zeros((N, C), np.bool_),
        behaviour_logprobs=np.zeros((N, C), np.float32),
        advantages=np.zeros(N, np.float32),
        token_weights=np.zeros((N, C), np.float32),
        index=np.full(N, -1, np.int64),
    )
    for row, i in enumerate(chosen):
        c = completions[i]
        prompt, length = len(c.prompt_ids), len(c.completion_ids)
        batch.tokens[row, :prompt] = c.prompt_ids
        batch.tokens[row, prompt : prompt + length] = c.completion_ids
        batch.start[row] = prompt - 1
        batch.targets[row, :length] = c.completion_ids
        batch.mask[row, :length] = True
        batch.behaviour_logprobs[row, :length] = c.behaviour_logprobs
        batch.advantages[row] = c.advantage
        batch.token_weights[row, :length] = weights[i]
        batch.index[row] = i
    return batch


def _ceil(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
