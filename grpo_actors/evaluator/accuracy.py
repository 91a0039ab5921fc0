"""Compute the statistics of scores: confidence intervals, figures of k samples, tests of two policies.

Pure: counts and shares in, numbers out. It depends on no model and no task. Every interval is two-sided with 95 %
confidence, over the problems: it shows how the figure would vary with other problems of the same kind.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from grpo_actors.score import Estimate

#: The two-sided 95 % quantile of the normal distribution.
Z95 = 1.959964
#: Resamples of a bootstrap. With this number, another seed moves the ends of the interval by a hundredth of its width.
RESAMPLES = 10_000
#: Resamples drawn at a time, which limits the memory to a few megabytes per thousand problems.
_RESAMPLES_AT_ONCE = 500


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """Return the 95 % interval of the share right / total (Wilson, 1927).

    At shares of 0 and 1 it has a sensible width, where the usual interval has none.
    """
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # The interval contains the share, but at 0 and 1 rounding may exclude it by the last bit.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate the probability that at least one of k samples is right: 1 − C(n−c, k) / C(n, k).

    This is the share of all subsets of k of the n samples that contain a right one. It is unbiased (Chen et al. 2021,
    arXiv:2107.03374, equation 1); 1 − (1 − c/n)^k is biased.

    Args:
        samples: n, at least k.
        right: c, the number of right samples.
        k: At least 1.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str], right: Sequence[bool]) -> float:
    """Return 1 if the most frequent answer of the samples is right, else 0.

    For a tie, return the share of the tied answers that are right: the expected value if one of them is drawn. An empty
    answer is no vote; if all answers are empty, the majority is wrong.

    Args:
        answers: The answer of each sample; samples that agree have equal answers.
        right: Whether each sample is right.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    most = max(votes.values())
    is_right = dict(zip(answers, right, strict=True))
    tied = [is_right[answer] for answer, count in votes.items() if count == most]
    return sum(tied) / len(tied)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean over problems, with its interval.

    If every value is 0 or 1, the interval is Wilson's. Otherwise it is that of the percentile bootstrap (Efron, 1979):
    problems are drawn with replacement, with the same seed every time. If all problems have the same value, a bootstrap
    has no width. For a value from 0 to 1 Wilson's interval is used then, which is too wide rather than too narrow.
    """
    mean = math.fsum(values) / len(values)
    different = set(values)
    if different <= {0, 1} or (len(different) == 1 and 0 <= mean <= 1):
        return _estimate(mean, wilson_interval(mean * len(values), len(values)))
    return _estimate(mean, _bootstrap_interval(values))


def mean_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return the mean of second − first over the same problems, with the interval of a bootstrap over pairs."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return _estimate(math.fsum(differences) / len(differences), _bootstrap_interval(differences))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    If both policies were equally good, each problem that only one of them solves would be a fair coin toss. Problems
    on which the two agree carry no information about which is better and do not count (McNemar, 1947).
    """
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    two_tails: float = 2 * tail / 2**discordant
    return min(1.0, two_tails)


def paired_difference(only_first: int, only_second: int, total: int) -> Estimate:
    """Return second's accuracy − first's on the same `total` problems, with the interval of Bonett and Price (2012).

    It is Wald's interval for paired shares with one added to each of the two counts. Without that, it would be too
    narrow for few discordant pairs (doi:10.3102/1076998611411915).
    """
    first, second = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    centre = second - first
    half = Z95 * math.sqrt((first + second - centre**2) / (total + 2))
    bounds = max(-1.0, centre - half), min(1.0, centre + half)
    return _estimate((only_second - only_first) / total, bounds)


def _estimate(value: float, bounds: tuple[float, float]) -> Estimate:
    low, high = bounds
    return Estimate(value=value, low=low, high=high)


def _bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    pool = np.array(values)
    generator = np.random.default_rng(0)
    means = np.concatenate(
        [
            pool[generator.integers(len(pool), size=(_RESAMPLES_AT_ONCE, len(pool)))].mean(axis=1)
            for _ in range(RESAMPLES // _RESAMPLES_AT_ONCE)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
