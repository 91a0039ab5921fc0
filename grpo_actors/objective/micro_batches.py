"""Ragged completions of one update, packed into micro-batches of right-padded arrays.

Knows token ids, log-probs and advantages as numbers on the host; refuses to know how they came about.
Every token carries its weight in the loss of the whole update (`aggregation`), so that the gradients of the
micro-batches just add up. Deterministic: the same completions in the same order give the same arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from grpo_actors.objective.aggregation import token_weights

Array = np.ndarray[Any, np.dtype[Any]]

#: Rows, and columns of a micro-batch, are padded up to multiples of these: few shapes are compiled.
ROW_MULTIPLE = 4
PROMPT_ROW_MULTIPLE = 2
PROMPT_MULTIPLE = 32
COMPLETION_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion with what the loss needs of it."""

    prompt_ids: Sequence[int]  # at least one: its last token predicts the first of the completion
    completion_ids: Sequence[int]  # stop tokens included
    behaviour_logprobs: Sequence[float]  # log μ of each completion token, nats, as recorded by the worker
    advantage: float
    valid: bool = True  # False: no valid reward, so masked
    truncated: bool = False  # hit max_new_tokens without a stop
    # Of each completion token whether the policy sampled it. The others (an environment's) are inputs, and no more:
    # they have no weight, and count in no length and no denominator. None: all.
    sampled: Sequence[bool] | None = None

    @property
    def trained(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.completion_ids) if self.sampled is None else sum(self.sampled)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """P prompts of L tokens, each there once, and N completions of C tokens; some of both are padding.

    The last token of a prompt is not among `prompts` but the first input of each of its completions, so that
    every input of a completion predicts one target, and nothing is predicted in `prompts`.
    """

    prompts: Array  # [P, L] int32, all but the last token, then padding
    prompt_lengths: Array  # [P] int32: tokens of each that are no padding, and the position of its last token
    prompt_of: Array  # [N] int32: which of the prompts a completion goes on from
    inputs: Array  # [N, C] int32, the last prompt token, then the completion but for its last token
    targets: Array  # [N, C] int32, the completion's tokens
    mask: Array  # [N, C] bool, completion tokens that train
    behaviour_logprobs: Array  # [N, C] float32, 0 where masked
    advantages: Array  # [N] float32
    token_weights: Array  # [N, C] float32, 0 where masked

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays by name, as MLX arrays; `objective_loss` and the model read these."""
        return {field.name: mx.array(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Update:
    """The micro-batches of one optimizer update, longest first, and what was packed into them."""

    micro_batches: tuple[
        MicroBatch, ...
    ]  # none if all completions are masked or skipped: there is nothing to learn
    completions: int  # all that were given
    active: int  # of them, those whose tokens have weight in the loss
    tokens: int  # prompt and completion tokens of the rows computed: a prompt counts once for each completion
    padding_share: float  # of all places computed, those that hold no token


def pack(
    completions: Sequence[Completion],
    *,
    rows: int,
    aggregation: str,
    max_new_tokens: int,
    mask_truncated: bool = False,
    skip_zero_advantage: bool = False,
    shared_prompts: bool = True,
    row_multiple: int = ROW_MULTIPLE,
    prompt_multiple: int = PROMPT_MULTIPLE,
    completion_multiple: int = COMPLETION_MULTIPLE,
) -> Update:
    """Cut one update into micro-batches.

    Masked completions (invalid, empty, or truncated under `mask_truncated`) are never computed; they count
    in the denominators as the aggregation says. The rest is put in order and dealt in runs, longest first, so
    that a micro-batch that does not fit in memory fails at once. Completions of one prompt stay together, for
    the prompt is then computed once; or neighbours are of one length, and pad each other little: whichever
    makes fewer places.

    Args:
        completions: All of the update, of all groups and all ranks: a rank then takes every n-th micro-batch.
        rows: Most completions in a micro-batch.
        aggregation: A key of `AGGREGATIONS`.
        max_new_tokens: L_max, tokens.
        mask_truncated: Leave out completions that hit the limit.
        skip_zero_advantage: Do not compute completions with A = 0 either. The gradient is the same as long
            as neither KL nor entropy is in the loss; the statistics then speak of the others alone.
        shared_prompts: Whether the model will compute a prompt once, or again for each completion.
        row_multiple: N is a multiple of this, or `rows` where that is smaller; `rows` gives one N for all.
        prompt_multiple: L is a multiple of this.
        completion_multiple: C is a multiple of this.

    Raises:
        ValueError: A completion's ids, log-probs and `sampled` differ in number, or its prompt is empty.
    """
    _check(completions)
    masked = [not c.valid or (mask_truncated and c.truncated) for c in completions]
    lengths = np.array([0 if m else c.trained for c, m in zip(completions, masked, strict=True)], int)
    weights = token_weights(aggregation, lengths, max_new_tokens=max_new_tokens)
    kept = [
        i
        for i, c in enumerate(completions)
        if lengths[i] and not (skip_zero_advantage and c.advantage == 0.0)
    ]
    kept.sort(key=lambda i: (-len(completions[i].completion_ids), -len(completions[i].prompt_ids), i))
    multiples = Shape(PROMPT_ROW_MULTIPLE, prompt_multiple, row_multiple, completion_multiple)
    orders = (kept, _prompts_together(completions, kept))
    cuts = [_cut(completions, order, rows, multiples) for order in orders]
    runs, shapes = min(cuts, key=lambda cut: sum(shape.places(shared_prompts) for shape in cut[1]))
    micro_batches = [
        _micro_batch(completions, run, weights, shape) for run, shape in zip(runs, shapes, strict=True)
    ]
    places = sum(shape.places(shared_prompts) for shape in shapes)
    filled = sum(_tokens(completions, run, shared_prompts) for run in runs)
    return Update(
        micro_batches=tuple(micro_batches),
        completions=len(completions),
        active=int(np.count_nonzero(lengths)),
        tokens=sum(len(completions[i].prompt_ids) + len(completions[i].completion_ids) for i in kept),
        padding_share=1.0 - filled / places if places else 0.0,
    )


class Shape(NamedTuple):
    """Of a micro-batch, or what each of the four is a multiple of."""

    P: int
    L: int
    N: int
    C: int

    def places(self, shared_prompts: bool) -> int:  # noqa: FBT001 - as `pack` names it
        """Tokens that the model is given, padding included."""
        return self.P * self.L + self.N * self.C if shared_prompts else self.N * (self.L + self.C)


def _check(completions: Sequence[Completion]) -> None:
    for i, c in enumerate(completions):
        if len(c.prompt_ids) == 0:
            raise ValueError(f"completion {i}: the prompt must have a token, got none")
        if len(c.completion_ids) != len(c.behaviour_logprobs):
            raise ValueError(
                f"completion {i}: every token needs one behaviour log-prob, "
                f"got {len(c.completion_ids)} tokens and {len(c.behaviour_logprobs)} log-probs"
            )
        if c.sampled is not None and len(c.sampled) != len(c.completion_ids):
            raise ValueError(
                f"completion {i}: sampled must be of {len(c.completion_ids)} tokens, got {len(c.sampled)}"
            )


def _prompts_together(completions: Sequence[Completion], chosen: Sequence[int]) -> list[int]:
    """The chosen with those of one prompt side by side, in the order in which the prompts come first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in chosen:
        groups.setdefault(tuple(completions[i].prompt_ids), []).append(i)
    return [i for group in groups.values() for i in group]


def _prompts(completions: Sequence[Completion], run: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Each prompt of the run -> its number, in order."""
    distinct = dict.fromkeys(tuple(completions[i].prompt_ids) for i in run)
    return {prompt: number for number, prompt in enumerate(distinct)}


def _cut(
    completions: Sequence[Completion], order: Sequence[int], rows: int, multiples: Shape
) -> tuple[list[Sequence[int]], list[Shape]]:
    """Runs of at most `rows` completions, and the shapes that hold them, padded up."""
    runs = [order[first : first + rows] for first in range(0, len(order), rows)]
    prompts = [_prompts(completions, run) for run in runs]
    most = max(map(len, prompts), default=0)
    return runs, [
        Shape(
            P=min(_ceil(len(own), multiples.P), most),
            L=_ceil(max(1, *(len(prompt) - 1 for prompt in own)), multiples.L),
            N=min(_ceil(len(run), multiples.N), rows),
            C=_ceil(max(len(completions[i].completion_ids) for i in run), multiples.C),
        )
        for run, own in zip(runs, prompts, strict=True)
    ]


def _tokens(completions: Sequence[Completion], run: Sequence[int], shared_prompts: bool) -> int:  # noqa: FBT001
    """Of the places of a run, those that hold a token."""
    prompts = _prompts(completions, run) if shared_prompts else [completions[i].prompt_ids for i in run]
    return sum(len(prompt) - 1 for prompt in prompts) + sum(len(completions[i].completion_ids) for i in run)


def _micro_batch(
    completions: Sequence[Completion], run: Sequence[int], weights: Array, shape: Shape
) -> MicroBatch:
    P, L, N, C = shape
    batch = MicroBatch(
        prompts=np.zeros((P, L), np.int32),
        prompt_lengths=np.zeros(P, np.int32),
        prompt_of=np.zeros(N, np.int32),
        inputs=np.zeros((N, C), np.int32),
        targets=np.zeros((N, C), np.int32),
        mask=np.zeros((N, C), np.bool_),
        behaviour_logprobs=np.zeros((N, C), np.float32),
        advantages=np.zeros(N, np.float32),
        token_weights=np.zeros((N, C), np.float32),
    )
    prompts = _prompts(completions, run)
    for prompt, number in prompts.items():
        batch.prompts[number, : len(prompt) - 1] = prompt[:-1]
        batch.prompt_lengths[number] = len(prompt) - 1
    for row, i in enumerate(run):
        c = completions[i]
        length = len(c.completion_ids)
        batch.prompt_of[row] = prompts[tuple(c.prompt_ids)]
        batch.inputs[row, 0] = c.prompt_ids[-1]
        batch.inputs[row, 1:length] = c.completion_ids[:-1]
        batch.targets[row, :length] = c.completion_ids
        trains = np.ones(length, np.bool_) if c.sampled is None else np.array(c.sampled, np.bool_)
        batch.mask[row, :length] = trains
        batch.behaviour_logprobs[row, :length] = np.where(trains, c.behaviour_logprobs, 0.0)
        batch.advantages[row] = c.advantage
        batch.token_weights[row, :length] = np.where(trains, weights[i], 0.0)
    return batch


def _ceil(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
