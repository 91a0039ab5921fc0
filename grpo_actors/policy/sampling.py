"""Sampling: prompts and seeds in; token ids, and the log-prob of each under the policy, out."""

from collections.abc import Callable, Iterator, Sequence

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
    *,
    version: int = 0,
) -> list[list[Sample]]:
    """Sample `len(seeds[i])` completions of prompt i, as many side by side as `max_kv_tokens` lets.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        prompts: P lists of token ids, none empty.
        seeds: P lists of 64-bit seeds, one a completion; none empty.
        params: The same for all.
        on_step: Called at each step with the number of tokens that it adds; may raise to give up.
        version: Number of the weights, recorded with every token.

    Returns:
        P lists of samples, in the order of the seeds.
    """
    with fused(policy.model), fixed_norms(policy.model):
        if not fits(policy):
            return sample_fixed(policy, prompts, seeds, params, on_step, version=version)
        completions, longest = sum(map(len, seeds)), max(map(len, prompts))
        sampler = Sampler(policy, params, places_for(completions, longest, params), version)
        for i, (prompt, group) in enumerate(zip(prompts, seeds, strict=True)):
            sampler.submit(i, prompt, group)
        done = dict(_sampled(sampler, on_step))
    return [done[i] for i in range(len(prompts))]


def _sampled(sampler: Sampler, on_step: Callable[[int], None] | None) -> Iterator[tuple[int, list[Sample]]]:
    """Step until idle: every group as soon as it is whole."""
    while not sampler.idle:
        tokens, groups = sampler.step()
        yield from groups
        if on_step and tokens:
            on_step(tokens)


def places_for(completions: int, longest_prompt: int, params: SamplingParams) -> int:
    """How many of so many completions may be decoded side by side; `longest_prompt` in tokens."""
    if not params.max_kv_tokens:
        return completions
    return min(completions, max(1, params.max_kv_tokens // (longest_prompt + params.max_new_tokens)))
