"""Pack the ragged completions of one update into micro-batches.

A micro-batch is a few rows of tokens. A row holds prompts, each followed by completions of it, one after the other; every
completion sees its own prompt and itself. So a prompt is computed once for all of its completions in a row, and
completions of any lengths fill a row.

Depends on token ids, log-probs and advantages as numbers on the host, not on their origin. Every token carries its
weight in the loss of the whole update (`aggregation`), so that the gradients of the micro-batches add up.
Deterministic: the same completions in the same order give the same arrays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.dealing import deal
from grpo_actors.objective.aggregation import token_weights

Array = np.ndarray[Any, np.dtype[Any]]

#: Columns are padded up to multiples of this number.
MULTIPLE = 16
#: Lengths of rows that are tried, in multiples of the shortest that holds every completion with its prompt.
ROW_LENGTHS = (1, 1.5, 2, 3, 4, 6)
#: Tokens of a row at which attention takes as long as the rest of a layer, roughly: its time grows with the square.
ATTENTION_TOKENS = 2048
#: What each micro-batch costs besides its tokens, in micro-batches of the largest size; an estimate.
OVERHEAD = 1 / 8


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
class Layout:
    """The sizes of micro-batches (see `MicroBatch`)."""

    #: Most positions B · T. A micro-batch has at least one row, however long.
    tokens: int
    #: Most completions N.
    completions: int
    #: Whether several completions share a row; if not, a row is one prompt and one completion, as any model takes it.
    shared: bool = True
    #: Tokens T of a row, if all micro-batches are to have one of a few shapes; 0: whatever fits best.
    fixed_row: int = 0
    #: Tokens C of the longest completion, for a `fixed_row`.
    longest: int = 0
    #: Ranks that compute the micro-batches of an update side by side.
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B rows of T tokens, which hold N completions of at most C tokens and predict K targets; all with padding.

    The last token of a prompt is not part of the prompt. It is the first input of each of its completions, so that every
    input of a completion predicts one target, and a prompt predicts nothing.
    """

    tokens: Array  # [B, T] int32, the inputs: prompts and completions without their last tokens
    positions: Array  # [B, T] int32, of each token in its own text
    prompt_of: Array  # [B, T] int32, number of the token's prompt in its row; −1: padding
    completion_of: Array  # [B, T] int32, number of the token's completion in its row, from 1; 0: a prompt
    inputs_at: Array  # [K] int32, which of the B · T tokens predict
    targets: Array  # [K] int32, what they predict
    target_at: Array  # [N, C] int32, which of the K targets is this token of this completion
    mask: Array  # [N, C] bool, completion tokens that train
    behaviour_logprobs: Array  # [N, C] float32, 0 where masked
    advantages: Array  # [N] float32
    token_weights: Array  # [N, C] float32, 0 where masked

    def arrays(self) -> dict[str, mx.array]:
        """Return all fields by name, as MLX arrays for `objective_loss` and the model."""
        return {field.name: mx.array(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Update:
    """The micro-batches of one optimizer update, and counts of their content."""

    #: Empty if all completions are masked or skipped: there is nothing to learn.
    micro_batches: tuple[MicroBatch, ...]
    #: Of each micro-batch: which of the given completions it holds, in order.
    numbers: tuple[tuple[int, ...], ...]
    completions: int  # all completions given
    active: int  # those whose tokens have weight in the loss
    tokens: int  # prompt and completion tokens of the computed completions: a prompt counts once for each
    padding_share: float  # share of the computed positions that hold no token


def pack(
    completions: Sequence[Completion],
    layout: Layout,
    *,
    aggregation: str,
    max_new_tokens: int,
    mask_truncated: bool = False,
    skip_zero_advantage: bool = False,
) -> Update:
    """Cut one update into micro-batches.

    Masked completions (invalid, empty, or truncated under `mask_truncated`) are never computed. The aggregation
    decides whether they count in the denominators.

    Args:
        completions: All completions of the update, of all groups and ranks; `dealing.deal` then divides its micro-batches.
        layout: The sizes of a micro-batch.
        aggregation: A key of `AGGREGATIONS`.
        max_new_tokens: L_max, tokens.
        mask_truncated: Whether to leave out truncated completions.
        skip_zero_advantage: Whether not to compute completions with A = 0 either. The gradient stays the same if
            the loss has no KL and no entropy term; the statistics then cover the other completions only.

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
    sizes = {i: len(completions[i].completion_ids) for i in kept}
    groups = _groups(completions, kept, sizes)
    rows = _rows(groups, sizes, layout)
    parts = _dealt_parts(rows, layout)
    micro_batches = tuple(_micro_batch(completions, groups, part, weights, layout) for part in parts)
    positions = sum(batch.tokens.size for batch in micro_batches)
    filled = sum(row.used for row in rows)
    return Update(
        micro_batches=micro_batches,
        numbers=tuple(tuple(_held(part)) for part in parts),
        completions=len(completions),
        active=int(np.count_nonzero(lengths)),
        tokens=sum(len(completions[i].prompt_ids) + len(completions[i].completion_ids) for i in kept),
        padding_share=1.0 - filled / positions if positions else 0.0,
    )


def empty_micro_batch(layout: Layout, longest: int) -> MicroBatch:
    """Return a micro-batch of the largest fixed shape, with padding only; `longest`: tokens of the longest text."""
    row = _ceil(longest, layout.fixed_row)
    rows = max(1, layout.tokens // row)
    return _micro_batch([], [], [_Row(row)] * rows, np.zeros(0), layout)


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


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """The kept completions of one prompt, by number, longest first."""

    prompt: Sequence[int]  # all tokens but the last
    completions: Sequence[int]


@dataclass(slots=True)
class _Row:
    """The content of a row."""

    length: int  # T
    used: int = 0
    completions: int = 0
    #: Number of a group -> its completions in this row.
    texts: dict[int, list[int]] = field(default_factory=dict)

    def needs(self, group: int, prompt: int, length: int) -> int:
        """Return the tokens that one more completion of a group adds, given the lengths of its prompt and itself."""
        return length + (0 if group in self.texts else prompt)

    def add(self, group: int, prompt: int, completion: int, length: int) -> None:
        self.used += self.needs(group, prompt, length)
        self.completions += 1
        self.texts.setdefault(group, []).append(completion)


def _groups(completions: Sequence[Completion], kept: Sequence[int], sizes: dict[int, int]) -> list[_Group]:
    """Put the kept completions of each prompt together, the groups of most tokens first."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in kept:
        by_prompt.setdefault(tuple(completions[i].prompt_ids[:-1]), []).append(i)
    groups = [
        _Group(prompt, sorted(numbers, key=lambda i: -sizes[i])) for prompt, numbers in by_prompt.items()
    ]
    return sorted(groups, key=lambda group: -len(group.prompt) - sum(sizes[i] for i in group.completions))


def _rows(groups: Sequence[_Group], sizes: dict[int, int], layout: Layout) -> list[_Row]:
    """Distribute the completions over rows of equal length, the fullest rows first."""
    if not groups:
        return []
    shortest = max(len(group.prompt) + sizes[group.completions[0]] for group in groups)
    if layout.fixed_row:
        return _fill(groups, sizes, layout, _ceil(shortest, layout.fixed_row))
    shortest = _ceil(shortest, MULTIPLE)
    if not layout.shared:
        return _fill(groups, sizes, layout, shortest)
    lengths = {_ceil(round(shortest * factor), MULTIPLE) for factor in ROW_LENGTHS}
    fitting = [length for length in sorted(lengths) if length <= max(layout.tokens, shortest)]
    tried = [_fill(groups, sizes, layout, length) for length in fitting]
    return min(tried, key=lambda rows: len(rows) * rows[0].length * (1 + rows[0].length / ATTENTION_TOKENS))


def _fill(groups: Sequence[_Group], sizes: dict[int, int], layout: Layout, length: int) -> list[_Row]:
    """Put each completion where it leaves the least room."""
    rows: list[_Row] = []
    for number, group in enumerate(groups):
        prompt = len(group.prompt)
        for i in group.completions:
            fitting = [
                row
                for row in rows
                if row.used + row.needs(number, prompt, sizes[i]) <= length
                and row.completions < layout.completions
            ]
            if not fitting or not layout.shared:
                rows.append(_Row(length))
                fitting = rows[-1:]
            # Next to its own prompt if possible: the prompt is then not computed again.
            best = min(fitting, key=lambda row: (number not in row.texts, -row.used))
            best.add(number, prompt, i, sizes[i])
    return sorted(rows, key=lambda row: -row.used)


def _dealt_parts(rows: Sequence[_Row], layout: Layout) -> list[list[_Row]]:
    """Cut the rows into micro-batches: as large as may be, or smaller if the busiest rank then has fewer tokens."""
    best = list(_parts(rows, layout))
    tokens = layout.tokens
    while layout.ranks > 1 and rows and tokens >= 2 * rows[0].length:
        tokens //= 2
        smaller = list(_parts(rows, replace(layout, tokens=tokens)))
        if _work(smaller, layout) < _work(best, layout):
            best = smaller
    return best


def _work(parts: Sequence[Sequence[_Row]], layout: Layout) -> float:
    """Estimate the work of the busiest rank, in tokens."""
    sizes = [len(part) * part[0].length for part in parts]
    dealt = deal(sizes, layout.ranks)
    return max(sum(sizes[i] for i in numbers) + len(numbers) * OVERHEAD * layout.tokens for numbers in dealt)


def _parts(rows: Sequence[_Row], layout: Layout) -> Iterator[list[_Row]]:
    """Cut the rows into micro-batches; with fixed shapes, fill up the number of rows with empty ones."""
    part: list[_Row] = []
    for row in rows:
        full = (len(part) + 1) * row.length > layout.tokens
        if part and (full or sum(each.completions for each in [*part, row]) > layout.completions):
            yield _padded(part, layout)
            part = []
        part.append(row)
    if part:
        yield _padded(part, layout)


def _padded(part: list[_Row], layout: Layout) -> list[_Row]:
    if not layout.fixed_row:
        return part
    length, count = part[0].length, max(1, layout.tokens // part[0].length)
    while count > 1 and (count + 1) // 2 >= len(part):
        count = (count + 1) // 2
    return part + [_Row(length) for _ in range(count - len(part))]


# --- arrays ---------------------------------------------------------------------------------------


def _micro_batch(
    completions: Sequence[Completion],
    groups: Sequence[_Group],
    rows: Sequence[_Row],
    weights: Array,
    layout: Layout,
) -> MicroBatch:
    B, T = len(rows), rows[0].length
    held = _held(rows)
    lengths = [len(completions[i].completion_ids) for i in held]
    if layout.fixed_row:
        # More completions, or longer ones, only if a recorded run had other limits.
        N, C, K = max(layout.completions, len(held)), max([layout.longest, *lengths]), B * T
    else:
        N, C, K = len(held), max(lengths), sum(lengths)
    C = _ceil(C, MULTIPLE)
    batch = MicroBatch(
        tokens=np.zeros((B, T), np.int32),
        positions=np.zeros((B, T), np.int32),
        prompt_of=np.full((B, T), -1, np.int32),
        completion_of=np.zeros((B, T), np.int32),
        inputs_at=np.arange(K, dtype=np.int32),
        targets=np.zeros(K, np.int32),
        target_at=np.zeros((N, C), np.int32),
        mask=np.zeros((N, C), np.bool_),
        behaviour_logprobs=np.zeros((N, C), np.float32),
        advantages=np.zeros(N, np.float32),
        token_weights=np.zeros((N, C), np.float32),
    )
    n = k = 0
    for b, row in enumerate(rows):
        t = in_row = 0
        for number, (of_group, group) in enumerate(row.texts.items()):
            prompt = groups[of_group].prompt
            end = t + len(prompt)
            batch.tokens[b, t:end] = prompt
            batch.positions[b, t:end] = np.arange(len(prompt))
            batch.prompt_of[b, t : end + sum(len(completions[i].completion_ids) for i in group)] = number
            t = end
            for i in group:
                c = completions[i]
                length, in_row = len(c.completion_ids), in_row + 1
                end = t + length
                batch.tokens[b, t] = c.prompt_ids[-1]
                batch.tokens[b, t + 1 : end] = c.completion_ids[:-1]
                batch.positions[b, t:end] = len(prompt) + np.arange(length)
                batch.completion_of[b, t:end] = in_row
                at = np.arange(b * T + t, b * T + end)
                if (
                    not layout.fixed_row
                ):  # with fixed shapes every token of the micro-batch predicts, used or not
                    batch.inputs_at[k : k + length] = at
                    at = np.arange(k, k + length)
                    k += length
                batch.targets[at] = c.completion_ids
                batch.target_at[n, :length] = at
                _fill_completion(batch, n, c, weights[i])
                t, n = end, n + 1
    return batch


def _held(rows: Sequence[_Row]) -> list[int]:
    """Return the numbers of the completions in these rows, in order."""
    return [i for row in rows for group in row.texts.values() for i in group]


def _fill_completion(batch: MicroBatch, n: int, c: Completion, weight: float) -> None:
    length = len(c.completion_ids)
    trains = np.ones(length, np.bool_) if c.sampled is None else np.array(c.sampled, np.bool_)
    batch.mask[n, :length] = trains
    batch.behaviour_logprobs[n, :length] = np.where(trains, c.behaviour_logprobs, 0.0)
    batch.advantages[n] = c.advantage
    batch.token_weights[n, :length] = np.where(trains, weight, 0.0)


def _ceil(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
