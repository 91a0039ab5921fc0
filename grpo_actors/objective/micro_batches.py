"""Pack the ragged completions of one update into micro-batches of right-padded arrays.

Depends on token ids, log-probs and advantages as numbers on the host, not on their origin. Every token carries its
weight in the loss of the whole update (`aggregation`), so that the gradients of the micro-batches add up.
Deterministic: the same completions in the same order give the same arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from grpo_actors.objective.aggregation import token_weights

Array = np.ndarray[Any, np.dtype[Any]]

#: The rows and columns of a micro-batch are padded up to multiples of these, so that few shapes are compiled.
ROW_MULTIPLE = 4
PROMPT_ROW_MULTIPLE = 2
PROMPT_MULTIPLE = 32
COMPLETION_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion, with the data that the loss needs."""

    prompt_ids: Sequence[int]  # at least one: the last one predicts the first token of the completion
    completion_ids: Sequence[int]  # stop tokens included
    behaviour_logprobs: Sequence[float]  # log μ of each completion token, nats, as recorded by the worker
    advantage: float
    valid: bool = True  # False: it has no valid reward and is masked
    truncated: bool = False  # it reached max_new_tokens without a stop
    # For each completion token, whether the policy sampled it; None: all. The other tokens come from an environment
    # and are only inputs: they have no weight, and count in no length and no denominator.
    sampled: Sequence[bool] | None = None

    @property
    def sampled_tokens(self) -> int:
        """Return the number of tokens that the policy sampled."""
        return len(self.completion_ids) if self.sampled is None else sum(self.sampled)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """P different prompts of L tokens, and N completions of C tokens; both may include rows of padding.

    The last token of a prompt is not in `prompts`. It is the first input of each of its completions, so that every
    input of a completion predicts one target, and `prompts` predicts nothing.
    """

    prompts: Array  # [P, L] int32, all tokens but the last, then padding
    prompt_lengths: (
        Array  # [P] int32: tokens of each prompt without padding, and the position of its last token
    )
    prompt_of: Array  # [N] int32: row of the prompt that a completion continues
    inputs: Array  # [N, C] int32, the last prompt token, then the completion without its last token
    targets: Array  # [N, C] int32, the completion's tokens
    mask: Array  # [N, C] bool, completion tokens that train
    behaviour_logprobs: Array  # [N, C] float32, 0 where masked
    advantages: Array  # [N] float32
    token_weights: Array  # [N, C] float32, 0 where masked

    def arrays(self) -> dict[str, mx.array]:
        """Return all fields by name, as MLX arrays for `objective_loss` and the model."""
        return {field.name: mx.array(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Update:
    """The micro-batches of one optimizer update, longest first, and counts of their content."""

    #: Empty if all completions are masked or skipped: there is nothing to learn.
    micro_batches: tuple[MicroBatch, ...]
    completions: int  # all completions given
    active: int  # those whose tokens have weight in the loss
    tokens: int  # prompt and completion tokens of the computed rows: a prompt counts once for each completion
    padding_share: float  # share of the computed positions that hold no token


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

    Masked completions (invalid, empty, or truncated under `mask_truncated`) are never computed. The aggregation
    decides whether they count in the denominators. The rest is ordered and cut into chunks, longest first, so that a
    micro-batch that does not fit in memory fails at once. There are two candidate orders: completions of one prompt
    together, so that the prompt is computed once; or completions of similar length together, so that there is little
    padding. The order with fewer computed positions is taken.

    Args:
        completions: All completions of the update, of all groups and ranks; a rank then takes every n-th micro-batch.
        rows: Largest number of completions in a micro-batch.
        aggregation: A key of `AGGREGATIONS`.
        max_new_tokens: L_max, tokens.
        mask_truncated: Whether to leave out truncated completions.
        skip_zero_advantage: Whether not to compute completions with A = 0 either. The gradient stays the same if
            the loss has no KL and no entropy term; the statistics then cover the other completions only.
        shared_prompts: Whether the model computes a prompt once, or again for each completion.
        row_multiple: N is a multiple of this, or `rows` where that is smaller; `rows` gives one N for all.
        prompt_multiple: L is a multiple of this.
        completion_multiple: C is a multiple of this.

    Raises:
        ValueError: A completion's ids, log-probs and `sampled` differ in number, or its prompt is empty.
    """
    _check(completions)
    masked = [not c.valid or (mask_truncated and c.truncated) for c in completions]
    lengths = np.array([0 if m else c.sampled_tokens for c, m in zip(completions, masked, strict=True)], int)
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
    chunks, shapes = min(cuts, key=lambda cut: sum(shape.positions(shared_prompts) for shape in cut[1]))
    micro_batches = [
        _micro_batch(completions, chunk, weights, shape) for chunk, shape in zip(chunks, shapes, strict=True)
    ]
    positions = sum(shape.positions(shared_prompts) for shape in shapes)
    filled = sum(_tokens(completions, chunk, shared_prompts) for chunk in chunks)
    return Update(
        micro_batches=tuple(micro_batches),
        completions=len(completions),
        active=int(np.count_nonzero(lengths)),
        tokens=sum(len(completions[i].prompt_ids) + len(completions[i].completion_ids) for i in kept),
        padding_share=1.0 - filled / positions if positions else 0.0,
    )


class Shape(NamedTuple):
    """The four sizes of a micro-batch (see `MicroBatch`), or the multiples to which they are padded."""

    P: int
    L: int
    N: int
    C: int

    def positions(self, shared_prompts: bool) -> int:  # noqa: FBT001 - as `pack` names it
        """Return the number of token positions that the model computes, padding included."""
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
    """Reorder the chosen completions so that those of one prompt are adjacent; prompts stay in order of appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in chosen:
        groups.setdefault(tuple(completions[i].prompt_ids), []).append(i)
    return [i for group in groups.values() for i in group]


def _prompts(completions: Sequence[Completion], chunk: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Number the different prompts of a chunk in order of appearance."""
    distinct = dict.fromkeys(tuple(completions[i].prompt_ids) for i in chunk)
    return {prompt: number for number, prompt in enumerate(distinct)}


def _cut(
    completions: Sequence[Completion], order: Sequence[int], rows: int, multiples: Shape
) -> tuple[list[Sequence[int]], list[Shape]]:
    """Return chunks of at most `rows` completions, and the padded shapes that hold them."""
    chunks = [order[first : first + rows] for first in range(0, len(order), rows)]
    prompts = [_prompts(completions, chunk) for chunk in chunks]
    most = max(map(len, prompts), default=0)
    return chunks, [
        Shape(
            P=min(_ceil(len(own), multiples.P), most),
            L=_ceil(max(1, *(len(prompt) - 1 for prompt in own)), multiples.L),
            N=min(_ceil(len(chunk), multiples.N), rows),
            C=_ceil(max(len(completions[i].completion_ids) for i in chunk), multiples.C),
        )
        for chunk, own in zip(chunks, prompts, strict=True)
    ]


def _tokens(completions: Sequence[Completion], chunk: Sequence[int], shared_prompts: bool) -> int:  # noqa: FBT001
    """Return the number of a chunk's positions that hold a token."""
    prompts = _prompts(completions, chunk) if shared_prompts else [completions[i].prompt_ids for i in chunk]
    return sum(len(prompt) - 1 for prompt in prompts) + sum(len(completions[i].completion_ids) for i in chunk)


def _micro_batch(
    completions: Sequence[Completion], chunk: Sequence[int], weights: Array, shape: Shape
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
    prompts = _prompts(completions, chunk)
    for prompt, number in prompts.items():
        batch.prompts[number, : len(prompt) - 1] = prompt[:-1]
        batch.prompt_lengths[number] = len(prompt) - 1
    for row, i in enumerate(chunk):
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
