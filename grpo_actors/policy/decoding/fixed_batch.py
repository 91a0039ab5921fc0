"""One batch of prompts from beginning to end, with mlx-lm's own caches: for models that no `window` holds.

Sliding windows, convolutions and state spaces keep more, or less, than the keys and values of every
position. Their rows start together, and a row that ends is dropped with a quarter of the others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, make_prompt_cache

from grpo_actors.policy.decoding.draw import Array, Sample, SamplingParams, draw, draws
from grpo_actors.policy.model import Policy, same_logits


def sample_fixed(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None = None,
    *,
    version: int = 0,
) -> list[list[Sample]]:
    """As `sampling.sample_groups`; all completions are in one batch, whatever `max_kv_tokens` says."""
    if not _fit_one_batch(policy, prompts):
        pairs = zip(prompts, seeds, strict=True)
        return [
            sample_fixed(policy, [prompt], [group], params, on_step, version=version)[0]
            for prompt, group in pairs
        ]
    groups = [[Sample() for _ in group] for group in seeds]
    for tokens in fixed_steps(policy, prompts, seeds, groups, params, version=version):
        if on_step:
            on_step(tokens)
    return groups


def fixed_steps(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sample]],
    params: SamplingParams,
    *,
    version: int = 0,
) -> Iterator[int]:
    """Let the empty samples of `groups`, one for each seed, grow; yields at each step how many tokens it added.

    All prompts must be of one length, or the model must heed padding.
    """
    prompt_of_row = [i for i, group in enumerate(seeds) for _ in group]
    uniforms = mx.array(
        np.stack([draws(seed, params.max_new_tokens) for group in seeds for seed in group], axis=1)
    )
    samples = [sample for group in groups for sample in group]

    cache, logits = prefill(policy, prompts)
    take_rows(cache, mx.array(prompt_of_row))
    logits = logits[mx.array(prompt_of_row)]
    seen = _prompt_mask(prompts, prompt_of_row, logits.shape[-1]) if params.repetition_penalty != 1 else None

    rows = np.arange(len(samples))  # rows[i]: which sample the batch's row i is
    alive = np.ones(len(samples), dtype=np.bool_)
    token, logprob = draw(logits, uniforms[0], params, seen)
    mx.async_eval(token, logprob)  # type: ignore[no-untyped-call]
    for step in range(params.max_new_tokens):
        if step + 1 < params.max_new_tokens:
            # The next step is under way before this one is read: the device never waits for Python.
            seen = None if seen is None else mx.put_along_axis(seen, token[:, None], mx.array(True), axis=1)
            logits = policy.model(token[:, None], cache=cache)[:, -1]
            next_token, next_logprob = draw(logits, uniforms[step + 1][mx.array(rows)], params, seen)
            mx.async_eval(next_token, next_logprob)  # type: ignore[no-untyped-call]
        added = int(alive.sum())
        alive = _record(policy, [samples[row] for row in rows], token, logprob, params.stop, version)
        yield added
        if not alive.any() or step + 1 == params.max_new_tokens:
            break
        token, logprob = next_token, next_logprob
        if alive.sum() <= len(rows) * 3 // 4:
            kept = np.flatnonzero(alive)
            rows, alive, index = rows[kept], alive[kept], mx.array(kept)
            token, logprob = token[index], logprob[index]
            seen = None if seen is None else seen[index]
            take_rows(cache, index)


def prefill(policy: Policy, prompts: Sequence[Sequence[int]]) -> tuple[list[Any], mx.array]:
    """Run all prompts through the model once.

    Returns:
        The cache, one row a prompt, and the logits [P, V] that predict the first new token.
    """
    cache = make_prompt_cache(policy.model)
    # The last token of each prompt is fed by itself: its logits are the only ones wanted. Those of the
    # others are never computed, as MLX is lazy.
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
        policy.model(mx.array(padded), cache=cache)
    if min(lengths) < columns:
        for layer in cache:
            layer.finalize()
    logits = policy.model(mx.array([[prompt[-1]] for prompt in prompts]), cache=cache)[:, -1]
    mx.eval(logits)
    return cache, logits


def _fit_one_batch(policy: Policy, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the model answers these prompts side by side as it would one by one.

    Prompts of one length always; others only where the model heeds padding. Some recurrent ones do not:
    mlx-lm's mamba takes padding for text, and nothing fails. So the first ragged batch is tried out.
    """
    if len({len(prompt) for prompt in prompts}) == 1:
        return True
    if policy.heeds_padding is None:
        policy.heeds_padding = _heeds_padding(policy, max(prompts, key=len))
    return policy.heeds_padding


def _heeds_padding(policy: Policy, prompt: Sequence[int]) -> bool:
    """Whether a prompt's beginning gives the same logits beside the whole prompt as alone."""
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(policy.model)):
        return False
    beginning = prompt[: max(1, len(prompt) // 4)]
    _, together = prefill(policy, [prompt, beginning])
    _, alone = prefill(policy, [beginning])
    return same_logits(together[1], alone[0])


def take_rows(cache: Iterable[Any], rows: mx.array) -> None:
    """Keep (or repeat) these rows of a cache, in place."""
    for layer in cache:
        if isinstance(layer, CacheList):
            take_rows(layer.caches, rows)
        elif hasattr(layer, "filter"):
            layer.filter(rows)
        elif layer.keys is not None:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def _record(  # noqa: PLR0917 - one step's outcome
    policy: Policy,
    samples: Sequence[Sample],
    token: mx.array,
    logprob: mx.array,
    stop: tuple[str, ...],
    version: int,
) -> Array:
    """Append one step's tokens to the samples still running; returns which of them run on, [R]."""
    tokens, logprobs = np.array(token).tolist(), np.array(logprob).tolist()
    for sample, new, value in zip(samples, tokens, logprobs, strict=True):
        if sample.finished:
            continue
        sample.append(new, value, version)
        sample.finished = policy.ends(sample.tokens, stop)
    return np.array([not sample.finished for sample in samples])


def _prompt_mask(prompts: Sequence[Sequence[int]], prompt_of_row: list[int], vocabulary: int) -> mx.array:
    """[R, V] bool: the tokens of each row's prompt."""
    mask = np.zeros((len(prompt_of_row), vocabulary), dtype=np.bool_)
    for row, prompt in zip(mask, prompt_of_row, strict=True):
        row[np.asarray(prompts[prompt])] = True
    return mx.array(mask)
