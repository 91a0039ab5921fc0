import random
from itertools import combinations
from math import comb

import pytest

from grpo_actors.evaluator.accuracy import (
    majority,
    mcnemar_p,
    mean_difference,
    mean_estimate,
    paired_difference,
    pass_at_k,
    wilson_interval,
)

# --- one share ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By symmetry.
        (20, 20, 1 - 0.1611, 1.0000),
        (28, 29, 1 - 0.1718, 1 - 0.0061),
    ],
)
def test_the_interval_is_wilsons(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_contains_the_share_and_narrows_with_the_number():
    widths = []
    for total in (10, 100, 1000):
        low, high = wilson_interval(3 * total // 10, total)
        assert 0 < low < 0.3 < high < 1
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


# --- k samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(samples):
    for right in range(samples + 1):
        outcomes = [i < right for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(combinations(outcomes, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_is_the_mean_and_pass_at_n_is_whether_any_is_right():
    # 3 of 8 right. pass@2 = 1 − C(5, 2)/C(8, 2) = 1 − 10/28.
    assert pass_at_k(8, 3, 1) == 3 / 8
    assert pass_at_k(8, 3, 2) == pytest.approx(18 / 28)
    assert (pass_at_k(8, 0, 8), pass_at_k(8, 1, 8)) == (0.0, 1.0)


def test_pass_at_k_is_unbiased_whatever_the_number_of_samples():
    """If each of n samples is right with probability p, its mean over all outcomes is 1 − (1 − p)^k."""
    p, k = 0.3, 3
    for n in (3, 4, 7):
        mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["4", "4", "5"], 1.0),
        (["4", "5", "5"], 0.0),
        (["4", "5"], 1 / 2),  # a tie: one of the two is drawn
        (["4", "4", "5", "5", "6", "6", "7"], 1 / 3),
        (["", "", "4"], 1.0),  # no answer is no vote
        (["", ""], 0.0),
    ],
)
def test_the_majority_is_decided_by_votes_and_a_tie_counts_its_share_of_right_answers(answers, share):
    assert majority(answers, [answer == "4" for answer in answers]) == pytest.approx(share)


# --- means ----------------------------------------------------------------------------------------


def test_zeros_and_ones_have_wilsons_interval():
    estimate = mean_estimate([1.0] * 15 + [0.0] * 133)
    assert estimate.value == pytest.approx(15 / 148)
    assert (estimate.low, estimate.high) == wilson_interval(15, 148)


def test_equal_values_have_an_interval_of_some_width():
    estimate = mean_estimate([0.5] * 20)
    assert estimate.value == 0.5
    assert estimate.low < 0.4
    assert estimate.high > 0.6


@pytest.mark.parametrize("value", [2.0, -0.5])
def test_equal_values_beyond_a_share_are_certain(value):
    estimate = mean_estimate([value] * 20)
    assert (estimate.value, estimate.low, estimate.high) == (value, value, value)


def test_the_bootstrap_agrees_with_the_normal_interval_where_it_applies():
    # 400 values, uniform on {0, 1/4, 1/2, 3/4, 1}: variance 1/8, so a standard error of sqrt(1/8/400) = 0.01768.
    estimate = mean_estimate([i % 5 / 4 for i in range(400)])
    assert estimate.value == pytest.approx(0.5)
    assert (estimate.low, estimate.high) == pytest.approx(
        (0.5 - 1.96 * 0.01768, 0.5 + 1.96 * 0.01768), abs=0.002
    )
    assert estimate == mean_estimate([i % 5 / 4 for i in range(400)]), "the same every time"


def test_a_paired_difference_of_means_uses_the_pairs():
    # Problems differ a lot, the two policies little: the separate intervals overlap, but the paired one excludes 0.
    first = [i % 8 / 8 for i in range(80)]
    second = [value + (0.125 if i % 2 else 0.0) for i, value in enumerate(first)]
    separate = mean_estimate(first), mean_estimate(second)
    assert separate[0].high > separate[1].low
    paired = mean_difference(first, second)
    assert paired.value == pytest.approx(0.0625)
    assert 0.04 < paired.low < 0.0625 < paired.high < 0.08


# --- two policies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (3, 3, 1.0),  # both tails contain the middle: 84/64, capped at 1
    ],
)
def test_mcnemars_p_is_twice_the_smaller_tail_of_fair_coins(only_first, only_second, p):
    assert mcnemar_p(only_first, only_second) == p


def test_mcnemars_p_is_the_share_of_all_sign_flips_as_far_from_the_middle():
    for discordant in range(1, 11):
        for only_first in range(discordant + 1):
            away = abs(2 * only_first - discordant)
            flips = [flip.bit_count() for flip in range(2**discordant)]
            extreme = sum(abs(2 * count - discordant) >= away for count in flips)
            assert mcnemar_p(only_first, discordant - only_first) == pytest.approx(extreme / 2**discordant)


def test_mcnemars_p_works_for_large_counts():
    assert 0 < mcnemar_p(400, 600) < 1e-9
    assert mcnemar_p(0, 3000) == 0.0


def test_the_difference_has_bonett_and_prices_interval():
    # b = 2, c = 10 of 48: (3/50, 11/50), centre 0.16, variance (0.28 − 0.0256)/50 = 0.005088, half 0.13980.
    estimate = paired_difference(2, 10, 48)
    assert estimate.value == pytest.approx(8 / 48)
    assert (estimate.low, estimate.high) == pytest.approx((0.02020, 0.29980), abs=5e-5)


def test_swapping_the_policies_changes_the_sign_of_the_difference():
    there, back = paired_difference(2, 10, 48), paired_difference(10, 2, 48)
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))


def test_the_interval_of_a_difference_ends_where_differences_do():
    # (11/12, 1/12): centre −0.83, half 0.31.
    assert paired_difference(10, 0, 10).low == -1.0
    assert paired_difference(0, 10, 10).high == 1.0


def test_two_policies_that_never_differ_still_have_an_interval_of_some_width():
    estimate = paired_difference(0, 0, 20)
    assert estimate.value == 0
    assert estimate.low < -0.05
    assert estimate.high > 0.05


@pytest.mark.parametrize(("b", "c"), [(0.05, 0.05), (0.05, 0.2), (0.1, 0.4), (0.3, 0.3)])
def test_the_interval_contains_the_true_difference_about_19_times_in_20(b, c):
    """Compute the coverage exactly, over every table of 40 problems; b and c are the discordant probabilities."""
    n, covered = 40, 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            estimate = paired_difference(i, j, n)
            if estimate.low <= c - b <= estimate.high:
                covered += comb(n, i) * comb(n - i, j) * b**i * c**j * (1 - b - c) ** (n - i - j)
    assert 0.94 < covered < 0.985


def test_the_bootstrap_contains_the_true_mean_about_19_times_in_20():
    # 200 sets of 60 problems whose shares are 0, 1/4, …, 1 with mean 0.5.
    draws = random.Random(0)
    sets = [[draws.randrange(5) / 4 for _ in range(60)] for _ in range(200)]
    held = sum(estimate.low <= 0.5 <= estimate.high for estimate in map(mean_estimate, sets))
    assert 180 <= held <= 198  # 190 ± 2.6 standard deviations of 3.1
