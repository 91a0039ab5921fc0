import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_actors.objective.advantages import ADVANTAGES, compute_advantages
from grpo_actors.objective.shaping import overlong_penalty

NONE = float("nan")


def values_of(name, groups, weights=(1.0,), **more):
    return [
        a.values.tolist() for a in compute_advantages(name, [np.array(g) for g in groups], weights, **more)
    ]


def column(*rewards):
    return [[NONE if r is None else r] for r in rewards]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_equals_the_float64_reference_on_ragged_groups_with_invalid_rewards(name, seed):
    rng = np.random.default_rng(seed)
    weights = [1.0, 0.5, 0.0]
    groups = [
        [
            [None if rng.random() < 0.3 else float(rng.normal()) for _ in weights]
            for _ in range(rng.integers(1, 7))
        ]
        for _ in range(4)
    ]
    arrays = [np.array([[NONE if r is None else r for r in row] for row in g]) for g in groups]
    for got, expected in zip(
        compute_advantages(name, arrays, weights), reference.advantages(name, groups, weights), strict=True
    ):
        assert got.values == pytest.approx([a or 0.0 for a in expected], rel=1e-5, abs=1e-5)
        assert got.valid.tolist() == [a is not None for a in expected]
        assert got.values.dtype == np.float32


def test_group_divides_by_the_sample_deviation():
    # R = 1, 0, 0, 0: mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, so (3/4) / (1/2 + 1e-4) and −(1/4) / (…).
    assert values_of("group", [column(1.0, 0.0, 0.0, 0.0)])[0] == pytest.approx(
        [0.75 / 0.5001, *[-0.25 / 0.5001] * 3], rel=1e-6
    )


def test_batch_divides_by_the_deviation_of_all_rewards_and_not_of_the_centred_ones():
    # R = 0, 1 | 10, 11: mean 5.5, squares 30.25 + 20.25 + 20.25 + 30.25 = 101, sample variance 101 / 3.
    expected = 0.5 / (np.sqrt(101 / 3) + 1e-4)
    assert np.ravel(values_of("batch", [column(0.0, 1.0), column(10.0, 11.0)])) == pytest.approx(
        [-expected, expected] * 2
    )


def test_gdpo_separates_completions_that_a_sum_of_rewards_makes_equal():
    # Being right (one of four) is rarer than being formatted (two of four); both are worth 1. Normalised:
    # (1.5 −.5 −.5 −.5) and (−.866 .866 .866 −.866), sums .634 .366 .366 −1.366, of sample deviation .9194.
    group = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    summed = values_of("group", [group], (1.0, 1.0))[0]
    assert summed[0] == summed[1] == summed[2]
    assert values_of("gdpo", [group], (1.0, 1.0))[0] == pytest.approx([0.690, 0.398, 0.398, -1.486], rel=2e-3)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.0, 1e-30, 1e29])
def test_equal_rewards_give_exactly_zero(name, reward):
    # Sums of 0.1 are off by a rounding: 0.1 + 0.1 + 0.1 ≠ 0.3, which 1e-4 in a denominator would not hide in `none`.
    # The other group's deviations differ, so that the mean over the update is off by a rounding too.
    assert values_of(name, [column(*[reward] * 3), column(0.1, 0.7, 0.2, 0.9, 0.3)])[0] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_only_valid_completion_of_a_group_has_no_baseline_and_so_no_advantage(name):
    (only,) = compute_advantages(name, [np.array(column(None, 5.0, None))], (1.0,))
    assert only.values.tolist() == [0.0, 0.0, 0.0]
    assert only.valid.tolist() == [False, True, False]


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("bad", [NONE, float("inf"), -float("inf"), 1e300])
def test_a_reward_that_is_no_number_changes_nothing_for_the_others(name, bad):
    with_bad = values_of(name, [column(1.0, 0.0, bad, 0.5)])[0]
    without = values_of(name, [column(1.0, 0.0, 0.5)])[0]
    assert with_bad == [without[0], without[1], 0.0, without[2]]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_without_any_valid_reward_and_no_groups_at_all_are_no_error(name):
    assert values_of(name, [column(None, None)]) == [[0.0, 0.0]]
    assert values_of(name, []) == []


def test_a_function_of_weight_zero_is_only_watched():
    (a,) = compute_advantages("none", [np.array([[1.0, 5.0], [0.0, -5.0], [NONE, 9.0]])], (1.0, 0.0))
    assert a.values.tolist() == [0.5, -0.5, 0.0]
    assert a.valid.tolist() == [True, True, False]


def test_a_reward_is_the_weighted_sum_over_the_functions_that_gave_one():
    (a,) = compute_advantages("none", [np.array([[1.0, 4.0], [2.0, NONE], [NONE, NONE]])], (1.0, 0.5))
    assert a.rewards[:2].tolist() == [3.0, 2.0]
    assert np.isnan(a.rewards[2])


def test_rloo_is_the_mean_baseline_times_g_over_g_minus_1():
    rewards = [column(0.3, 1.0, -2.0, 0.7)]
    mean_baseline = np.array(values_of("none", rewards)[0])
    assert values_of("rloo", rewards)[0] == pytest.approx(mean_baseline * 4 / 3, rel=1e-6)


def test_the_overlong_penalty_is_one_more_reward_that_makes_nothing_valid():
    penalty = overlong_penalty(np.array([4, 9, 10]), max_new_tokens=10, overlong_tokens=2)
    (a,) = compute_advantages("none", [np.array(column(1.0, 1.0, None))], (1.0,), penalties=[penalty])
    # Rewards 1 and 1 − 1/2: mean 3/4.
    assert a.values.tolist() == [0.25, -0.25, 0.0]
    assert a.valid.tolist() == [True, True, False]


def test_misshapen_rewards_are_refused():
    with pytest.raises(ValueError, match="K = 2 weights"):
        compute_advantages("group", [np.zeros((4, 3))], (1.0, 1.0))
    with pytest.raises(ValueError, match="penalty must be"):
        compute_advantages("group", [np.zeros((4, 1))], (1.0,), penalties=[np.zeros(3)])
    with pytest.raises(ValueError, match="shorter"):
        compute_advantages("group", [np.zeros((4, 1))] * 2, (1.0,), penalties=[np.zeros(4)])


rewards_lists = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(rewards=rewards_lists, offset=st.floats(-100, 100), name=st.sampled_from(list(ADVANTAGES)))
def test_adding_a_constant_to_a_groups_rewards_changes_nothing(rewards, offset, name):
    moved = values_of(name, [column(*[r + offset for r in rewards])])[0]
    # 1e-4 in the denominator can lift a rounding of 1e-14 to 1e-10 at most.
    assert moved == pytest.approx(values_of(name, [column(*rewards)])[0], rel=1e-4, abs=1e-6)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(rewards=rewards_lists, name=st.sampled_from(list(ADVANTAGES)), seed=st.randoms(use_true_random=False))
def test_advantages_follow_their_completions_and_sum_to_zero(rewards, name, seed):
    order = list(range(len(rewards)))
    seed.shuffle(order)
    plain = values_of(name, [column(*rewards)])[0]
    shuffled = values_of(name, [column(*[rewards[i] for i in order])])[0]
    assert shuffled == pytest.approx([plain[i] for i in order], rel=1e-5, abs=1e-7)
    assert sum(plain) == pytest.approx(0.0, abs=1e-5 * max(1.0, *map(abs, plain)))
