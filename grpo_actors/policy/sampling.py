"""Sampling: prompts and seeds in; token ids, and the log-prob of each under the policy, out."""

from collections.abc import Callable, Sequence

from grpo_actors.policy.adapter import fused
from grpo_actors.policy.batching import Sampler
from grpo_actors.policy.decoding import fits
from grpo_actors.policy.dora import fixed_norms
from grpo_actors.policy.draw import Sample, SamplingParams
from grpo_actors.policy.fixed_batch import sample_fixed
from grpo_actors.policy.model import Policy

__all__ = ["Sample", "SamplingParams", "places_for", "sample_groups"]


def sample_groups(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """Sample `len(seeds[i])` completions of prompt i, as many side by side as `max_kv_tokens` lets.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        prompts: P lists of token ids, none empty.
        seeds: P lists of 64-bit seeds, one a completion; none empty.
        params: The same for all.
        on_step: Called at each step with the number of tokens that it adds; may raise to give up.

    Returns:
        P lists of samples, in the order of the seeds.
    """
    with fused(policy.model), fixed_norms(policy.model):
        if not fits(policy):
            return sample_fixed(policy, prompts, seeds, params, on_step)
        return _sample_in_window(policy, prompts, seeds, params, on_step)


def _sample_in_window(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None,
) -> list[list[Sample]]:
    sampler = Sampler(policy, params, places_for(prompts, seeds, params))
    for i, (prompt, group) in enumerate(zip(prompts, seeds, strict=True)):
        sampler.submit(i, prompt, group)
    done: dict[object, list[Sample]] = {}
    while not sampler.idle:
        tokens, groups = sampler.step()
        done.update(groups)
        if on_step and tokens:
            on_step(tokens)
    return [done[i] for i in range(len(prompts))]


def places_for(
    prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], params: SamplingParams
) -> int:
    """How many completions may be decoded side by side."""
    completions = sum(len(group) for group in seeds)
    if not params.max_kv_tokens:
        return completions
    longest = max(len(prompt) for prompt in prompts) + params.max_new_tokens
    return min(completions, max(1, params.max_kv_tokens // longest))
