from dataclasses import replace

import numpy as np
import pytest

from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.report import (
    ledger,
    length_metrics,
    reward_metrics,
    samples,
    source_metrics,
    staleness,
    thinking_metrics,
)
from grpo_actors.objective.advantages import compute_advantages
from grpo_actors.policy.thinking import Tags, Thinking
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
    assert metrics["reward_std"] == pytest.approx((8 / 9) ** 0.5)  # of 2, 2 and 0
    assert metrics["rewards"] == {"a": 1 / 3, "b": 0.75}
    assert metrics["invalid_completions"] == 1
    assert metrics["reward_failures"] == {}
    assert metrics["zero_variance_share"] == 0.5  # a group with one valid completion has no signal
    first = reward_metrics(GROUPS[:1], compute_advantages("group", matrices[:1], list(WEIGHTS.values())))
    assert first["zero_variance_share"] == 1.0


def test_without_a_valid_completion_there_is_no_reward():
    nothing = [replace(one, problem=replace(one.problem, source="s")) for one in GROUPS]
    advantages = compute_advantages("group", [np.full((2, 2), np.nan)] * 2, [1.0, 2.0])
    metrics = reward_metrics(nothing, advantages)
    assert (metrics["reward_mean"], metrics["reward_std"], metrics["invalid_completions"]) == (None, None, 4)
    assert source_metrics(nothing, advantages)["reward_by_source"] == {"s": None}


def test_a_logged_metric_is_the_mean_of_all_its_values_in_the_update():
    logging = [
        replace(GROUPS[0], logged={"solved": [1.0, 0.0], "b": [2.0]}),
        replace(GROUPS[1], logged={"solved": [0.5]}),
    ]
    metrics = reward_metrics(logging, compute_advantages("group", [np.zeros((2, 2))] * 2, [1.0, 2.0]))
    assert metrics["logged"] == {"b": 2.0, "solved": 0.5}  # (1 + 0 + 0.5) / 3


def test_a_reward_that_failed_counts_every_completion_of_its_group():
    failing = [replace(GROUPS[0], failures={"a": "raised", "environment": "raised"}), GROUPS[1]]
    metrics = reward_metrics(failing, compute_advantages("group", [np.zeros((2, 2))] * 2, [1.0, 2.0]))
    assert metrics["reward_failures"] == {"a": 2}


@pytest.mark.parametrize(
    ("written", "found"),
    [("<answer>1</answer>", ("1", "tags")), ("so **2** km", ("2", "bold")), ("none", ("", ""))],
)
def test_samples_say_what_found_the_answer(written, found):
    mathematics = replace(GROUPS[0], problem=replace(GROUPS[0].problem, mathematics=True))
    [sample] = samples([mathematics], 1, WEIGHTS, str, lambda *_: written)
    assert {(one["answer"], one["parser"]) for one in sample["completions"]} == {found}


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
    assert metrics["turns_mean"] == 1.0
    two_turns = replace(completion([1, 2, 3], {}), inserted=[1, 2])
    longer = length_metrics([replace(GROUPS[0], completions=[*GROUPS[0].completions, two_turns])])
    assert longer["turns_mean"] == 4 / 3  # 1, 1 and 2 turns
    assert longer["tokens"] == 2 + 1 + 2, "without what was inserted"


def test_thinking_is_measured_in_tokens_between_the_tags(tiny):
    assert thinking_metrics(GROUPS, tiny) == dict.fromkeys(
        ("thinking_length_mean", "thinking_share", "thinking_cut_share")  # the vocabulary has no tags
    )
    tiny.thinking = Thinking(Tags("<answer>", "b"), start=(5,), end=(6,), closing=(6,))
    cut = replace(completion([5, 7, 7, 6, 9, 9], {}), forced=[3, 4])  # 2 of its 5 sampled tokens
    two_turns = replace(completion([5, 7, 6, 1, 5, 7, 7], {}), inserted=[3, 4])  # 1 + 2 of 6
    group = replace(GROUPS[0], prompt=[3], completions=[cut, two_turns])
    [tag] = tiny.tokenizer.encode("<answer>")
    opened = replace(group, prompt=[3, tag], completions=[completion([7, 7, 7, 7], {})])  # all 4
    assert thinking_metrics([group, opened], tiny) == {
        "thinking_length_mean": 3.0,  # (2 + 3 + 4) / 3
        "thinking_share": 9 / 15,
        "thinking_cut_share": 1 / 3,
    }


def test_a_group_is_as_stale_as_its_oldest_token():
    assert staleness(GROUPS, 6) == {"1": 1, "6": 1}


def test_the_ledger_names_lease_epoch_problem_and_worker():
    assert ledger(GROUPS) == [[0, 2, "p0", "w1"], [1, 2, "p1", "w1"]]


def test_samples_show_the_users_turn_and_the_weighted_reward():
    [sample] = samples(GROUPS, 1, WEIGHTS, str, lambda *_: "")
    assert (sample["problem"], sample["prompt"], sample["answer"]) == ("p0", "q", "a")
    assert [c["reward"] for c in sample["completions"]] == [2.0, 0.0]
    assert [c["truncated"] for c in sample["completions"]] == [False, True]
    assert [c["text"] for c in sample["completions"]] == ["[1, 2]", "[1]"]  # the tokens, decoded
    assert list(samples(GROUPS, 0, WEIGHTS, str, lambda *_: "")) == []
    [of_a_replay] = samples(GROUPS, 1, {"b": 2.0}, str, lambda *_: "")  # which leaves one of the rewards out
    assert [c["reward"] for c in of_a_replay["completions"]] == [1.0, 0.0]
