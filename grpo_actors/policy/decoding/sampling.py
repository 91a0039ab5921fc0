"""Sample completions: prompts and seeds in; token ids and their log-probs under the policy out."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice

from grpo_actors.policy.decoding.batching import PREFILLED, Sampler
from grpo_actors.policy.decoding.draw import Respond, Sample, SamplingParams
from grpo_actors.policy.decoding.step import fits, require_fit
from grpo_actors.policy.model import Policy

__all__ = [
    "NO_ENVIRONMENT",
    "Sample",
    "Sampler",
    "SamplingParams",
    "grow_sample",
    "rows_for",
    "sample_groups",
    "sample_in_turn",
]

#: Key of the group, its prompt, and one seed per completion.
Group = tuple[int, Sequence[int], Sequence[int]]
#: The rule that `require_fit` names for a model that cannot have several turns.
NO_ENVIRONMENT = "data.environment: must be empty"


def sample_groups(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None = None,
    *,
    version: int = 0,
    responds: Sequence[Respond | None] | None = None,
) -> list[list[Sample]]:
    """Sample `len(seeds[i])` completions of prompt i, as many side by side as `max_kv_tokens` allows.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        prompts: P lists of token ids, none empty.
        seeds: P lists of 64-bit seeds, one per completion; none empty.
        params: Sampling parameters of all completions.
        on_step: Called at each step with the number of tokens that it adds; may raise to stop the sampling.
        version: Number of the weights, recorded with every token.
        responds: For each prompt the function that replies to the turns of its completions, or None for one turn; None for
            one turn everywhere.

    Returns:
        P lists of samples, in the order of the seeds.

    Raises:
        ConfigError: completions may have several turns, but the model cannot be batched continuously.
    """
    if responds is not None and any(responds):
        require_fit(policy, NO_ENVIRONMENT)
    max_rows = rows_for(policy, sum(map(len, seeds)), max(map(len, prompts)), params)
    done: dict[int, list[Sample]] = {}
    with closing(Sampler(policy, params, max_rows, version)) as sampler:
        for i, (prompt, group) in enumerate(zip(prompts, seeds, strict=True)):
            sampler.submit(i, prompt, group, responds[i] if responds else None)
        while not sampler.idle:
            tokens, groups = sampler.step()
            done.update(groups)
            if on_step and tokens:
                on_step(tokens)
    return [done[i] for i in range(len(prompts))]


def grow_sample(
    policy: Policy, prompt: Sequence[int], seed: int, params: SamplingParams
) -> Generator[Sample, None, None]:
    """Sample one completion, and yield the same growing object after each of its tokens."""
    with closing(Sampler(policy, params, max_rows=1)) as sampler:
        [sample] = sampler.submit(0, prompt, [seed])
        while not sampler.idle:
            tokens, _ = sampler.step()
            if tokens:
                yield sample


def sample_in_turn(
    policy: Policy,
    groups: Iterable[Group],
    params: SamplingParams,
    max_rows: int,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[Sample]]]:
    """Sample any number of groups, taken from `groups` as rows become free; yield each as soon as it is whole.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        groups: No prompt and no list of seeds is empty.
        params: Sampling parameters of all groups.
        max_rows: Most completions that are decoded side by side. If no window can hold the model's cache, a larger group is
            not divided.
        on_step: Called at each step with the number of tokens that it adds.
    """
    source, under_way = iter(groups), 0
    with closing(Sampler(policy, params, max_rows)) as sampler:
        while True:
            # Enough to fill every row, plus the prompts of one prefill; the sampler scans all waiting groups.
            for key, prompt, seeds in islice(source, max_rows + PREFILLED - under_way):
                sampler.submit(key, prompt, seeds)
                under_way += 1
            if sampler.idle:
                return
            tokens, done = sampler.step()
            if on_step and tokens:
                on_step(tokens)
            under_way -= len(done)
            yield from done


def rows_for(policy: Policy, completions: int, longest_prompt: int, params: SamplingParams) -> int:
    """Return how many of `completions` may be decoded side by side; `longest_prompt` in tokens.

    If no window can hold the model's cache, that is all of them: `max_kv_tokens` then bounds nothing.
    """
    if not params.max_kv_tokens or not fits(policy):
        return completions
    return min(completions, max(1, params.max_kv_tokens // (longest_prompt + params.max_new_tokens)))
