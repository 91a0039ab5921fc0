"""The gaps of an update: how far the log-probs that workers reported are from the learner's own (`schedule.quarantine`)."""

from collections.abc import Mapping, Sequence
from itertools import count

from grpo_actors.learner.groups import SampledGroup
from grpo_actors.schedule.quarantine import Gap


def gaps_by_lease(
    groups: Sequence[SampledGroup], nats: Mapping[int, float], version: int
) -> dict[int, list[Gap]]:
    """Return the gaps of each group, one for each completion that was computed.

    Args:
        groups: The groups of the update.
        nats: Number of a completion, counted over all groups -> the sum of its tokens' gaps.
        version: The version that they trained.
    """
    numbers = count()
    return {
        group.lease: [
            Gap(version - min(completion.versions), sum(completion.sampled), nats[number])
            for completion in group.completions
            if (number := next(numbers)) in nats
        ]
        for group in groups
    }


def mean_gaps(groups: Sequence[SampledGroup], gaps: Mapping[int, Sequence[Gap]]) -> dict[str, float]:
    """Return worker -> mean gap of its tokens, in nats; without workers of which nothing was computed."""
    measured: dict[str, list[Gap]] = {}
    for group in groups:
        measured.setdefault(group.worker, []).extend(gaps[group.lease])
    return {
        worker: sum(gap.nats for gap in of_worker) / sum(gap.tokens for gap in of_worker)
        for worker, of_worker in measured.items()
        if of_worker
    }
