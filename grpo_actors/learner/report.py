"""The report on the groups of an update: numbers for the metrics, texts for the samples. Pure functions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.objective.advantages import Advantages
from grpo_actors.policy.model import Policy
from grpo_actors.tasks.answers import find_answer
from grpo_actors.tasks.scoring import reward_means
from grpo_actors.tasks.task import Problem


def reward_metrics(groups: Sequence[SampledGroup], advantages: Sequence[Advantages]) -> dict[str, Any]:
    """Return mean and deviation of the weighted reward, the mean of each function, and the share without a signal."""
    rewards = np.concatenate([advantage.rewards[advantage.valid] for advantage in advantages])
    by_function = [completion.rewards for group in groups for completion in group.completions]
    flat = [advantage for advantage in advantages if not advantage.values.any()]
    return {
        "reward_mean": float(rewards.mean()) if rewards.size else None,
        "reward_std": float(rewards.std()) if rewards.size else None,
        # None for a function that gave no completion a valid reward.
        "rewards": {**dict.fromkeys(chain.from_iterable(by_function)), **reward_means(by_function)},
        "zero_variance_share": len(flat) / len(groups),
        "reward_failures": dict(_failures(groups)),
        "logged": _logged_means(groups),
        "invalid_completions": int(sum((~advantage.valid).sum() for advantage in advantages)),
    }


def _logged_means(groups: Sequence[SampledGroup]) -> dict[str, float]:
    """Return metric -> mean of all values that reward functions logged in the update."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for name, logged in group.logged.items():
            values.setdefault(name, []).extend(logged)
    return {name: float(np.mean(values[name])) for name in sorted(values)}


def source_metrics(groups: Sequence[SampledGroup], advantages: Sequence[Advantages]) -> dict[str, Any]:
    """Return the number of groups and the mean weighted reward of each source of a mixture; None for both without one."""
    rewards: dict[str, list[float]] = {}
    for group, advantage in zip(groups, advantages, strict=True):
        rewards.setdefault(group.problem.source, []).extend(advantage.rewards[advantage.valid].tolist())
    counts = Counter(group.problem.source for group in groups)
    if "" in counts:
        return {"groups_by_source": None, "reward_by_source": None}
    names = sorted(counts)
    return {
        "groups_by_source": {name: counts[name] for name in names},
        "reward_by_source": {
            name: float(np.mean(rewards[name])) if rewards[name] else None for name in names
        },
    }


def _failures(groups: Sequence[SampledGroup]) -> Counter[str]:
    """Return reward that failed -> number of completions that have no value for that reason."""
    failed: Counter[str] = Counter()
    for group in groups:
        for name in group.failures.keys() & group.completions[0].rewards.keys():
            failed[name] += len(group.completions)
    return failed


def length_metrics(groups: Sequence[SampledGroup]) -> dict[str, Any]:
    """Return completion lengths in sampled tokens, the mean number of turns, and the share of truncated completions."""
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


def thinking_metrics(groups: Sequence[SampledGroup], policy: Policy) -> dict[str, float | None]:
    """Return the mean tokens of thinking, their share of the sampled tokens, and the share of completions cut in it.

    None if the vocabulary has no tags for it.
    """
    if not policy.thinking.start:
        return dict.fromkeys(("thinking_length_mean", "thinking_share", "thinking_cut_share"))
    lengths, sampled, cut = [], 0, 0
    for group in groups:
        opened = policy.begins_thinking(group.prompt)
        for completion in group.completions:
            sampled += sum(completion.sampled)
            cut += bool(completion.forced)
            length = 0
            for start, stop in completion.turn_bounds:
                begins = policy.begins_thinking(completion.tokens[:start]) if start else opened
                length += policy.thinking.length(completion.tokens[start:stop], opened=begins)
            lengths.append(length)
    return {
        "thinking_length_mean": float(np.mean(lengths)),
        "thinking_share": sum(lengths) / sampled,
        "thinking_cut_share": cut / len(lengths),
    }


def staleness(groups: Sequence[SampledGroup], version: int) -> dict[str, int]:
    """Return {versions behind `version`: number of groups}; the oldest token of a group counts."""
    behind = Counter(version - min(min(c.versions) for c in group.completions) for group in groups)
    return {str(lag): behind[lag] for lag in sorted(behind)}


def ledger(groups: Sequence[SampledGroup]) -> list[list[Any]]:
    """Return [lease, epoch, problem, worker] of each consumed group, to check that each trained exactly once."""
    return [[group.lease, group.epoch, group.problem.id, group.worker] for group in groups]


def _answer(text: str, problem: Problem) -> dict[str, str]:
    """Return the answer in a completion and what found it, as the accuracy reads both."""
    answer, parser = find_answer(text, mathematics=problem.mathematics)
    return {"answer": answer, "parser": parser}


def samples(
    groups: Sequence[SampledGroup],
    count: int,
    weights: dict[str, float],
    decode: Callable[[Sequence[int]], str],
    judged: Callable[[SampledGroup, SampledCompletion], str],
) -> Iterator[dict[str, Any]]:
    """Return the first `count` groups as texts with their rewards; `judged` gives the text in which answers are looked for."""
    for group in groups[:count]:
        yield {
            "problem": group.problem.id,
            "prompt": group.problem.messages[-1]["content"],
            "answer": group.problem.answer,
            "completions": [
                {
                    "text": decode(completion.tokens),
                    "reward": sum(
                        weights.get(name, 0.0) * value  # a replay may use fewer functions than were recorded
                        for name, value in completion.rewards.items()
                        if value
                    ),
                    "rewards": completion.rewards,
                    "truncated": not completion.finished,
                    "extra": completion.extra,
                    **_answer(judged(group, completion), group.problem),
                }
                for completion in group.completions
            ],
        }
