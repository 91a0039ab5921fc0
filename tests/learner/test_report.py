from dataclasses import replace

import numpy as np

from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.report import (
    ledger,
    length_metrics,
    reward_metrics,
    samples,
    source_metrics,
    staleness,
)
from grpo_actors.objective.advantages import compute_advantages
from grpo_actors.tasks.task import Problem


def completion(tokens, rewards, *, versions=None, finished=True):
    return SampledCompletion(tokens, [0.0] * len(tokens), versions or [0] * len(tokens), finished, rewards)


def group(*completions, lease=0):
    problem = Problem(
        f"p{lease}", ({"role": "system", "content": "s"}, {"role": "user", "content": "q"}), "a", {}
    )
    return SampledGroup(lease, 2, problem, [1], "w1", list(completions))


GROUPS = [
    group(completion([1, 2], {"a": 1.0, "b": 0.5}), completion([1], {"a": None, "b": None}, finished=False)),
    group(
        completion([1, 2, 3], {"a": 0.0, "b": 1.0}, versions=[5, 6, 6]),
        completion([1], {"a": 0.0, "b": None}, versions=[6]),
        lease=1,
    ),
]
WEIGHTS = {"a": 1.0, "b": 2.0}


def test_rewards_are_reported_weighted_together_and_unweighted_apart():
    matrices = [np.array([[1.0, 0.5], [np.nan] * 2]), np.array([[0.0, 1.0], [0.0, np.nan]])]
    metrics = reward_metrics(GROUPS, compute_advantages("group", matrices, list(WEIGHTS.values())))
    assert metrics["reward_mean"] == (2.0 + 2.0 + 0.0) / 3  # 1 + 2 · 0.5; 2 · 1; 0; the fourth has none
    assert metrics["rewards"] == {"a": 1 / 3, "b": 0.75}
    assert metrics["invalid_completions"] == 1
    assert metrics["zero_variance_share"] == 0.5  # a group with one valid completion has no signal


def test_each_source_of_a_mixture_has_its_groups_and_the_mean_reward_of_its_valid_completions():
    matrices = [np.array([[1.0, 0.5], [np.nan] * 2]), np.array([[0.0, 1.0], [0.0, np.nan]])]
    advantages = compute_advantages("group", matrices, list(WEIGHTS.values()))
    assert source_metrics(GROUPS, advantages) == {"groups_by_source": None, "reward_by_source": None}
    named = [
        replace(one, problem=replace(one.problem, source=name))
        for one, name in zip(GROUPS, "ba", strict=True)
    ]
    # b: 1 + 2 · 0.5, and one that is not valid; a: 2 · 1 and 0.
    assert source_metrics(named, advantages) == {
        "groups_by_source": {"a": 1, "b": 1},
        "reward_by_source": {"a": 1.0, "b": 2.0},
    }


def test_lengths_count_every_completion():
    metrics = length_metrics(GROUPS)
    assert (metrics["completion_length_mean"], metrics["completion_length_max"]) == (7 / 4, 3)
    assert (metrics["truncated_share"], metrics["tokens"], metrics["completions"], metrics["groups"]) == (
        0.25,
        7,
        4,
        2,
    )


def test_a_group_is_as_stale_as_its_oldest_token():
    assert staleness(GROUPS, 6) == {"1": 1, "6": 1}


def test_the_ledger_names_lease_epoch_problem_and_worker():
    assert ledger(GROUPS) == [[0, 2, "p0", "w1"], [1, 2, "p1", "w1"]]


def test_samples_show_the_users_turn_and_the_weighted_reward():
    [sample] = samples(GROUPS, 1, WEIGHTS, str)
    assert (sample["problem"], sample["prompt"], sample["answer"]) == ("p0", "q", "a")
    assert [c["reward"] for c in sample["completions"]] == [2.0, 0.0]
    assert [c["truncated"] for c in sample["completions"]] == [False, True]
    assert [c["text"] for c in sample["completions"]] == ["[1, 2]", "[1]"]  # the tokens, decoded
    assert list(samples(GROUPS, 0, WEIGHTS, str)) == []
