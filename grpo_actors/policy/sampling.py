"""Sampling: prompts and seeds in; token ids, and the log-prob of each under the policy, out.

Each prompt is prefilled once and its KV rows are repeated for the completions of its group. Random
numbers are drawn on the host before the first step, one uniform a token from a generator of the
sample's own (Philox keyed by its seed): the same seed gives the same draws on every back end, in
every batch and at every attempt, and MLX's global random state is never touched.

A token is drawn by inverting the cumulative distribution rather than by the Gumbel trick: the
exponentials are shared with the log-prob, and the exponential is what a CPU spends its time on.

The recorded log-prob is that of the policy at the sampling temperature, before top-p, top-k, min-p
and the repetition penalty: what the learner can compute again. With such a filter on, tokens come from
a narrower distribution than the one recorded, and the importance ratio does not correct for it: its
denominator is too small by the share of probability that was filtered out. `SamplingParams.bias` is the
sentence that tells the user.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, make_prompt_cache

from grpo_actors.policy.dora import fixed_norms
from grpo_actors.policy.model import Policy


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; the names are those of every inference engine."""

    max_new_tokens: int
    #: 0: greedy, and log-probs are those at temperature 1.
    temperature: float = 1.0
    top_p: float = 1.0
    #: 0: off.
    top_k: int = 0
    min_p: float = 0.0
    #: Divides positive and multiplies negative logits of every token seen in prompt or completion.
    repetition_penalty: float = 1.0
    #: Strings that end a completion once its text holds them.
    stop: tuple[str, ...] = ()

    @property
    def filters(self) -> bool:
        """Whether any token can be ruled out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def bias(self) -> str | None:
        """What makes the sampled distribution another than the recorded one, in words; None: nothing does."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        off = SamplingParams(self.max_new_tokens)
        used = [
            f"{name} = {getattr(self, name)}" for name in names if getattr(self, name) != getattr(off, name)
        ]
        if not used:
            return None
        return (
            f"{', '.join(used)}: completions come from a narrower distribution than the policy's, "
            "which the importance ratios do not correct"
        )


@dataclass(slots=True)
class Sample:
    """One completion: ids and log-probs of equal length, the stop token included."""

    tokens: list[int]
    logprobs: list[float]
    #: True: ended by a stop token or string; False: cut at max_new_tokens.
    finished: bool


def sample_groups(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """Sample `len(seeds[i])` completions of prompt i, all prompts in one batch.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        prompts: P lists of token ids, none empty.
        seeds: P lists of 64-bit seeds, one a completion; none empty.
        params: The same for all.
        on_step: Called at each step with the number of tokens that it adds; may raise to give up.

    Returns:
        P lists of samples, in the order of the seeds.
    """
    if not _fit_one_batch(policy, prompts):
        pairs = zip(prompts, seeds, strict=True)
        return [sample_groups(policy, [prompt], [group], params, on_step)[0] for prompt, group in pairs]
    with fixed_norms(policy.model):
        return _sample_together(policy, prompts, seeds, params, on_step)


def _sample_together(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None,
) -> list[list[Sample]]:
    prompt_of_row = [i for i, group in enumerate(seeds) for _ in group]
    uniforms = mx.array(
        np.stack([draws(seed, params.max_new_tokens) for group in seeds for seed in group], axis=1)
    )
    samples = [Sample([], [], finished=False) for _ in prompt_of_row]

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
        if on_step:
            on_step(int(alive.sum()))
        alive = _record(policy, [samples[row] for row in rows], token, logprob, params.stop)
        if not alive.any() or step + 1 == params.max_new_tokens:
            break
        token, logprob = next_token, next_logprob
        if alive.sum() <= len(rows) * 3 // 4:
            kept = np.flatnonzero(alive)
            rows, alive, index = rows[kept], alive[kept], mx.array(kept)
            token, logprob = token[index], logprob[index]
            seen = None if seen is None else seen[index]
            take_rows(cache, index)
    first = iter(samples)
    return [[next(first) for _ in group] for group in seeds]


def draws(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """`count` float32 uniforms in [0, 1) of one sample: a function of its seed alone."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32)


def draw(
    logits: mx.array, uniform: mx.array, params: SamplingParams, seen: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """One token for each row, and its log-prob.

    Args:
        logits: [R, V], any float type.
        uniform: [R] in [0, 1).
        params: Temperature and filters.
        seen: [R, V] bool, tokens that the repetition penalty falls on; None: no penalty.

    Returns:
        Token ids [R] (uint32) and log-probs [R] (float32).
    """
    logits = logits.astype(mx.float32)
    scaled = logits / params.temperature if params.temperature > 0 else logits
    top = scaled.max(axis=-1, keepdims=True)
    weights = mx.exp(scaled - top)  # unnormalised probabilities, the largest is 1
    log_total = mx.log(weights.sum(axis=-1, keepdims=True)) + top
    if seen is not None:
        penalised = mx.where(
            scaled > 0, scaled / params.repetition_penalty, scaled * params.repetition_penalty
        )
        scaled_for_choice = mx.where(seen, penalised, scaled)
        weights = mx.exp(scaled_for_choice - scaled_for_choice.max(axis=-1, keepdims=True))
    if params.temperature == 0:
        token = mx.argmax(weights, axis=-1)
    else:
        weights = _filter(weights, params) if params.filters else weights
        cumulative = mx.cumsum(weights, axis=-1)
        # A parallel scan need not be monotone in its last bit: a token of weight zero must never win, and
        # where no token reaches the draw (2, above any weight) the likeliest is taken.
        reached = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
        token = mx.argmax(mx.where(reached, 2.0, weights), axis=-1)
    chosen = mx.take_along_axis(scaled, token[:, None], axis=-1)
    return token, (chosen - log_total)[:, 0]


def _filter(weights: mx.array, params: SamplingParams) -> mx.array:
    """Zero the weight [R, V] of tokens outside top-k, top-p and min-p; the best token always stays."""
    keep = mx.ones(weights.shape, dtype=mx.bool_)
    if params.min_p > 0:
        keep = keep & (weights >= params.min_p * weights.max(axis=-1, keepdims=True))
    if params.top_k > 0 or params.top_p < 1:
        order = mx.argsort(-weights, axis=-1)
        ranked = mx.take_along_axis(weights, order, axis=-1)
        before = mx.cumsum(ranked, axis=-1) - ranked
        inside = before < params.top_p * weights.sum(axis=-1, keepdims=True)
        if params.top_k > 0:
            inside = inside & (mx.arange(weights.shape[-1]) < params.top_k)
        keep = keep & mx.put_along_axis(mx.zeros_like(keep), order, inside, axis=-1)
    return mx.where(keep, weights, 0)


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
    together, alone = together[1].astype(mx.float32), alone[0].astype(mx.float32)
    # Half precision differs by a few percent of the deviation, another text by about all of it.
    return bool(mx.abs(together - alone).mean() < 0.2 * mx.std(alone))


def take_rows(cache: Iterable[Any], rows: mx.array) -> None:
    """Keep (or repeat) these rows of a cache, in place."""
    for layer in cache:
        if isinstance(layer, CacheList):
            take_rows(layer.caches, rows)
        elif hasattr(layer, "filter"):
            layer.filter(rows)
        elif layer.keys is not None:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def _record(
    policy: Policy, samples: Sequence[Sample], token: mx.array, logprob: mx.array, stop: tuple[str, ...]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Append one step's tokens to the samples still running; returns which of them run on, [R]."""
    tokens, logprobs = np.array(token).tolist(), np.array(logprob).tolist()
    for sample, new, value in zip(samples, tokens, logprobs, strict=True):
        if sample.finished:
            continue
        sample.tokens.append(new)
        sample.logprobs.append(value)
        sample.finished = new in policy.stop_tokens or (
            bool(stop) and policy.ends_with_stop(sample.tokens, stop)
        )
    return np.array([not sample.finished for sample in samples])


def _prompt_mask(prompts: Sequence[Sequence[int]], prompt_of_row: list[int], vocabulary: int) -> mx.array:
    """[R, V] bool: the tokens of each row's prompt."""
    mask = np.zeros((len(prompt_of_row), vocabulary), dtype=np.bool_)
    for row, prompt in zip(mask, prompt_of_row, strict=True):
        row[np.asarray(prompts[prompt])] = True
    return mx.array(mask)
