import numpy as np
import pytest

from grpo_actors.objective.aggregation import AGGREGATIONS, token_weights

#: Four completions, the third masked.
LENGTHS = np.array([2, 6, 0, 4])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # A third of the loss for each of the three that train, shared among its tokens.
        ("grpo", [1 / 3 / 2, 1 / 3 / 6, 0, 1 / 3 / 4]),
        # 2 + 6 + 4 active tokens.
        ("dapo", [1 / 12, 1 / 12, 0, 1 / 12]),
        ("bnpo", [1 / 12, 1 / 12, 0, 1 / 12]),
        # The masked one keeps its place: 4 completions of at most 10 tokens.
        ("dr_grpo", [1 / 40, 1 / 40, 0, 1 / 40]),
    ],
)
def test_the_denominators_are_those_of_the_papers(name, expected):
    assert token_weights(name, LENGTHS, max_new_tokens=10) == pytest.approx(expected)


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_an_update_in_which_all_is_masked_weighs_nothing(name, lengths):
    assert token_weights(name, np.array(lengths, int), max_new_tokens=10).tolist() == [0.0] * len(lengths)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_only_token_of_an_update_has_all_of_the_weight(name):
    assert token_weights(name, np.array([1, 0]), max_new_tokens=1).tolist() == [
        0.5 if name == "dr_grpo" else 1.0,  # two places of one token
        0.0,
    ]


def test_dapo_with_equal_lengths_is_grpo():
    lengths = np.array([5, 5, 0, 5])
    assert token_weights("dapo", lengths, max_new_tokens=9) == pytest.approx(
        token_weights("grpo", lengths, max_new_tokens=9)
    )


def test_dr_grpo_scales_by_the_longest_length_allowed_and_by_nothing_else():
    short = token_weights("dr_grpo", LENGTHS, max_new_tokens=8)
    assert token_weights("dr_grpo", LENGTHS, max_new_tokens=16) == pytest.approx(short / 2)
    assert token_weights("dr_grpo", LENGTHS * 2, max_new_tokens=8) == pytest.approx(short)


def test_a_limit_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens must be ≥ 1, got 0"):
        token_weights("dr_grpo", LENGTHS, max_new_tokens=0)
