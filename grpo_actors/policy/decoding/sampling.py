"""Sampling: prompts and seeds in; token ids, and the log-prob of each under the policy, out."""

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

#: Whose completions they are, the prompt, one seed a completion.
Group = tuple[int, Sequence[int], Sequence[int]]
#: What `require_fit` says of a model that cannot have turns.
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
    """Sample `len(seeds[i])` completions of prompt i, as many side by side as `max_kv_tokens` lets.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        prompts: P lists of token ids, none empty.
        seeds: P lists of 64-bit seeds, one a completion; none empty.
        params: The same for all.
        on_step: Called at each step with the number of tokens that it adds; may raise to give up.
        version: Number of the weights, recorded with every token.
        responds: For each prompt what answers a turn of its completions; None, also for one prompt: they have one turn.

    Returns:
        P lists of samples, in the order of the seeds.

    Raises:
        ConfigError: there are turns, and the model cannot be batched continuously.
    """
    if responds is not None and any(responds):
        require_fit(policy, NO_ENVIRONMENT)
    places = rows_for(policy, sum(map(len, seeds)), max(map(len, prompts)), params)
    done: dict[int, list[Sample]] = {}
    with closing(Sampler(policy, params, places, version)) as sampler:
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
    """One completion while it grows: the same object after each of its tokens."""
    with closing(Sampler(policy, params, places=1)) as sampler:
        [sample] = sampler.submit(0, prompt, [seed])
        while not sampler.idle:
            tokens, _ = sampler.step()
            if tokens:
                yield sample


def sample_in_turn(
    policy: Policy,
    groups: Iterable[Group],
    params: SamplingParams,
    places: int,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[Sample]]]:
    """Any number of groups, taken from `groups` as places get free; each is yielded as soon as it is whole.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        groups: No prompt and no list of seeds is empty.
        params: The same for all.
        places: Completions that are decoded side by side, at most; for a model that no window holds, a
            group that is larger is not divided.
        on_step: Called at each step with the number of tokens that it adds.
    """
    source, under_way = iter(groups), 0
    with closing(Sampler(policy, params, places)) as sampler:
        while True:
            # Enough to fill every place, and prompts to prefill together; the sampler looks at all that wait.
            for key, prompt, seeds in islice(source, places + PREFILLED - under_way):
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
    """How many of so many completions may be decoded side by side; `longest_prompt` in tokens.

    All of them where no window holds the model: there `max_kv_tokens` bounds nothing.
    """
    if not params.max_kv_tokens or not fits(policy):
        return completions
    return min(completions, max(1, params.max_kv_tokens // (longest_prompt + params.max_new_tokens)))
