"""Sample completions: prompts and seeds in; token ids and their log-probs under the policy out."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import NamedTuple

from grpo_actors.policy.decoding.batching import PREFILLED, Sampler
from grpo_actors.policy.decoding.draw import Respond, Sample, SamplingParams
from grpo_actors.policy.decoding.step import fits, require_fit
from grpo_actors.policy.model import Policy

__all__ = [
    "NO_ENVIRONMENT",
    "Sample",
    "Sampler",
    "SamplingParams",
    "Submission",
    "grow_sample",
    "rows_for",
    "sample_groups",
    "sample_in_turn",
]

#: The rule that `require_fit` names for a model that cannot have several turns.
NO_ENVIRONMENT = "data.environment: must be empty"


class Submission(NamedTuple):
    """A group of completions to be sampled: the arguments of `Sampler.submit`."""

    key: int
    #: Token ids; not empty.
    prompt: Sequence[int]
    #: One 64-bit seed per completion; not empty.
    seeds: Sequence[int]
    #: Replies to the turns of the completions; None if they have one turn.
    respond: Respond | None = None


def sample_groups(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None = None,
    *,
    responds: Sequence[Respond | None] | None = None,
) -> list[list[Sample]]:
    """Sample `len(seeds[i])` completions of prompt i, as many side by side as `max_kv_tokens` allows.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        prompts: P lists of token ids, none empty.
        seeds: P lists of 64-bit seeds, one per completion; none empty.
        params: Sampling parameters of all completions.
        on_step: As for `sample_in_turn`.
        responds: For each prompt the function that replies to the turns of its completions, or None for one turn; None for
            one turn everywhere.

    Returns:
        P lists of samples, in the order of the seeds.

    Raises:
        ConfigError: As `sample_in_turn`.
    """
    submissions = map(Submission, range(len(prompts)), prompts, seeds, responds or [None] * len(prompts))
    max_rows = rows_for(policy, sum(map(len, seeds)), max(map(len, prompts)), params)
    done = dict(sample_in_turn(policy, submissions, params, max_rows, on_step))
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
    submissions: Iterable[Submission],
    params: SamplingParams,
    max_rows: int,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[Sample]]]:
    """Sample any number of groups, taken from `submissions` as rows become free; yield each as soon as it is whole.

    The device computes the next step while the caller handles a group.

    Args:
        policy: The model that samples; set to evaluation mode by its owner.
        submissions: The groups. Those of similar length are best next to each other: their prompts run through the model
            together, padded to the longest.
        params: Sampling parameters of all groups.
        max_rows: Most completions that are decoded side by side. If no window can hold the model's cache, a larger group is
            not divided.
        on_step: Called at each step with the number of tokens that it adds; may raise to stop the sampling.

    Yields:
        The key of a group, and its samples in the order of their seeds.

    Raises:
        ConfigError: completions may have several turns, but the model cannot be batched continuously.
    """
    source, under_way = iter(submissions), 0
    with closing(Sampler(policy, params, max_rows)) as sampler:
        while True:
            # Enough to fill every row, plus the prompts of one prefill; the sampler scans all waiting groups.
            for submission in islice(source, max_rows + PREFILLED - under_way):
                if submission.respond is not None:
                    require_fit(policy, NO_ENVIRONMENT)
                sampler.submit(*submission)
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
