from dataclasses import replace

import pytest

from grpo_actors.evaluator.comparison.result import (
    Answers,
    compare,
    completions_of,
    powers_of_two,
    sampled_of,
)
from grpo_actors.evaluator.comparison.table import as_sentence
from grpo_actors.evaluator.score import Answer, AnsweredProblem
from grpo_actors.tasks.task import Problem


def answered(number, *answers, true="4"):
    """Make problem `number` with these answers. Each completion has `number` tokens, and is truncated if empty."""
    return AnsweredProblem(
        Problem(f"p{number}", ({"role": "user", "content": "2+2?"},), true),
        [
            Answer(
                text=f"<answer>{given}</answer>",
                answer=given,
                parser="tags",
                correct=given == true,
                tokens=number,
                truncated=not given,
                rewards={"correctness": float(given == true), "rare": None if number else 1.0},
            )
            for given in answers
        ],
    )


def greedy(outcomes):
    return Answers([answered(i, "4" if right == "x" else "5") for i, right in enumerate(outcomes)], [])


@pytest.mark.parametrize(
    ("k", "powers"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_k_grows_by_powers_of_two_and_ends_at_the_number_of_samples(k, powers):
    assert powers_of_two(k) == powers


def test_the_figures_of_four_samples_of_two_problems():
    # c = 1 and 3 of 4. pass@2: 1 − C(3,2)/C(4,2) = 1/2 and 1 − 0 = 1. Majority: 5 with two of three votes; 4.
    sampled = sampled_of([answered(0, "4", "5", "5", ""), answered(1, "4", "4", "4", "5")], 0.7)
    assert (sampled.k, sampled.temperature) == (4, 0.7)
    assert sampled.avg.value == (1 / 4 + 3 / 4) / 2
    assert sampled.maj.value == (0 + 1) / 2
    assert {i: e.value for i, e in sampled.passed.items()} == {1: 1 / 2, 2: (1 / 2 + 1) / 2, 4: 1.0}
    assert sampled.completions.truncated_share == 1 / 8
    alone = sampled_of([answered(0, "4", "5", "5", "")], 0.7)
    assert (alone.k, alone.avg.value) == (4, 1 / 4)


def test_lengths_and_rewards_are_means_over_completions_and_a_reward_that_does_not_apply_is_left_out():
    completions = completions_of([answered(0, "4"), answered(3, "5"), answered(6, "5")])
    assert completions.length_mean == 3
    assert completions.rewards == {"correctness": pytest.approx(1 / 3), "rare": 1.0}


def test_two_policies_are_compared_problem_by_problem():
    pair = compare(("a", "b"), greedy("xxxx......"), greedy("xxx.xxxx.."))
    assert (pair.both_right, pair.only_first, pair.only_second, pair.both_wrong) == (3, 1, 4, 2)
    assert pair.difference.value == pytest.approx(3 / 10)
    assert pair.p_value == 2 * (1 + 5) / 2**5
    assert pair.sampled_difference is None
    assert as_sentence(pair).splitlines()[1:] == [
        "Of 10 problems both solve 3 and neither 2; 4 only the former, 1 only the latter.",
        "McNemar's exact test: p = 0.38; greedy answers to these problems do not tell which of the two is better.",
    ]


def test_the_sentence_names_the_better_policy_in_either_order():
    worse, better = greedy("x" + "." * 9), greedy("x" * 10)
    for pair in (compare(("worse", "better"), worse, better), compare(("better", "worse"), better, worse)):
        assert "; better is better, and chance" in as_sentence(pair)


@pytest.mark.parametrize(("p_value", "tells"), [(0.049, True), (0.05, False), (0.051, False)])
def test_a_difference_that_chance_shows_once_in_twenty_times_tells_nothing(p_value, tells):
    pair = compare(("worse", "better"), greedy("." * 10), greedy("x" * 10))
    sentence = as_sentence(replace(pair, p_value=p_value))
    assert ("better is better" in sentence) == tells
    assert ("do not tell which" in sentence) == (not tells)


def test_answers_to_another_number_of_problems_are_not_compared():
    with pytest.raises(ValueError, match="zip"):
        compare(("a", "b"), greedy("xx"), greedy("x"))


def test_samples_are_compared_by_their_share_of_each_problem():
    first = Answers(greedy("xx").greedy, [answered(0, "4", "5"), answered(1, "5", "5")])
    second = Answers(greedy("xx").greedy, [answered(0, "4", "4"), answered(1, "4", "5")])
    pair = compare(("a", "b"), first, second)
    assert pair.sampled_difference is not None
    assert pair.sampled_difference.value == 0.5
    assert "Sampled: +50.0 points" in as_sentence(pair)
