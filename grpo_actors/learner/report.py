"""What an update tells about its groups: numbers for the metrics and texts for the samples. Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from grpo_actors.learner.groups import SampledGroup
from grpo_actors.objective.advantages import Advantages
from grpo_actors.tasks.scoring import reward_means


def reward_metrics(groups: Sequence[SampledGroup], advantages: Sequence[Advantages]) -> dict[str, Any]:
    """Mean and deviation of the weighted reward, means of each function, groups without a signal."""
    rewards = np.concatenate([advantage.rewards[advantage.valid] for advantage in advantages])
    by_function = [completion.rewards for group in groups for completion in group.completions]
    flat = [advantage for advantage in advantages if not advantage.values.any()]
    return {
        "reward_mean": float(rewards.mean()) if rewards.size else None,
        "reward_std": float(rewards.std()) if rewards.size else None,
        # None for a function that judged no completion.
        "rewards": {**dict.fromkeys(chain.from_iterable(by_function)), **reward_means(by_function)},
        "zero_variance_share": len(flat) / len(groups),
        "invalid_completions": int(sum((~advantage.valid).sum() for advantage in advantages)),
    }


def length_metrics(groups: Sequence[SampledGroup]) -> dict[str, Any]:
    """Completion lengths in tokens that the policy sampled, its turns, and how many completions were cut."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [sum(completion.sampled) for completion in completions]
    return {
        "completion_length_mean": float(np.mean(lengths)),
        "completion_length_max": max(lengths),
        "turns_mean": float(np.mean([completion.turns for completion in completions])),
        "truncated_share": sum(not completion.finished for completion in completions) / len(completions),
        "groups": len(groups),
        "completions": len(completions),
        "tokens": sum(lengths),
    }


def staleness(groups: Sequence[SampledGroup], version: int) -> dict[str, int]:
    """Versions behind `version` -> number of groups; a group counts by its oldest token."""
    behind = Counter(version - min(min(c.versions) for c in group.completions) for group in groups)
    return {str(lag): behind[lag] for lag in sorted(behind)}


def ledger(groups: Sequence[SampledGroup]) -> list[list[Any]]:
    """Which lease was consumed, with its problem and worker: what a checker of exactly-once reads."""
    return [[group.lease, group.epoch, group.problem.id, group.worker] for group in groups]


def samples(
    groups: Sequence[SampledGroup], count: int, weights: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """The first `count` groups as texts with their rewards."""
    for group in groups[:count]:
        yield {
            "problem": group.problem.id,
            "prompt": group.problem.messages[-1]["content"],
            "answer": group.problem.answer,
            "completions": [
                {
                    "text": completion.text,
                    "reward": sum(
                        weights.get(name, 0.0) * value  # a replay may weigh fewer than were recorded
                        for name, value in completion.rewards.items()
                        if value
                    ),
                    "rewards": completion.rewards,
                    "truncated": not completion.finished,
                }
                for completion in group.completions
            ],
        }
