"""The statistics of right and wrong: how sure an accuracy is, what k samples are worth, whether two policies differ.

Pure: counts and shares in, numbers out. It knows no model and no task. Every interval is a two-sided one of 95 %,
over the problems: what it says is how the figure would move with other problems of the same kind.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: The two-sided 95 % quantile of the normal distribution.
Z95 = 1.959964
#: Resamples of a bootstrap: enough that another seed moves the ends of the interval by a hundredth of its width.
RESAMPLES = 10_000
#: Resamples drawn at a time: bounds the memory to a few megabytes a thousand problems.
_RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """95 % interval of the share right / total (Wilson, 1927): honest at 0 and at 1, where the usual one has no width."""
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # It holds the share, but at 0 and 1 the last bit may say otherwise.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that at least one of k samples is right: 1 − C(n−c, k) / C(n, k).

    The share of all subsets of k of the n samples that hold a right one, which is unbiased (Chen et al. 2021,
    arXiv:2107.03374, equation 1); 1 − (1 − c/n)^k is not.

    Args:
        samples: n, at least k.
        right: c, how many of them are right.
        k: At least 1.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str], right: Sequence[bool]) -> float:
    """Whether the answer that most samples give is right: 0 or 1, and between them where answers tie.

    Of several answers with the most votes one is drawn: what is returned is the share of them that is right. An
    empty answer is no vote; where nobody votes, it is wrong.

    Args:
        answers: What each sample answers, equal where they agree.
        right: Of each sample.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    most = max(votes.values())
    judged = dict(zip(answers, right, strict=True))
    tied = [judged[answer] for answer, count in votes.items() if count == most]
    return sum(tied) / len(tied)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean over problems of what each is worth, from 0 to 1.

    Where every problem counts 0 or 1 the interval is Wilson's. Else it is the percentile bootstrap's (Efron, 1979):
    problems are drawn with replacement, with the same seed every time. Where all problems have one value a bootstrap
    has no width, and Wilson's stands, which is then too wide rather than too narrow.
    """
    mean = math.fsum(values) / len(values)
    if set(values) <= {0, 1} or len(set(values)) == 1:
        return Estimate(mean, *wilson_interval(mean * len(values), len(values)))
    return Estimate(mean, *_bootstrap_interval(values))


def mean_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean over the same problems of second − first, with the interval of a bootstrap that keeps the pairs together."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return Estimate(math.fsum(differences) / len(differences), *_bootstrap_interval(differences))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: were both equally good, each problem that only one solves is a fair coin.

    Problems on which the two agree say nothing about which is better, and do not count (McNemar, 1947).
    """
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    two_tails: float = 2 * tail / 2**discordant
    return min(1.0, two_tails)


def paired_difference(only_first: int, only_second: int, total: int) -> Estimate:
    """Second's accuracy − first's on the same `total` problems, with the interval of Bonett and Price (2012).

    That is Wald's for paired shares with one added to each of the two counts, without which it is too narrow for few
    discordant pairs (doi:10.3102/1076998611411915).
    """
    first, second = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    centre = second - first
    half = Z95 * math.sqrt((first + second - centre**2) / (total + 2))
    return Estimate((only_second - only_first) / total, max(-1.0, centre - half), min(1.0, centre + half))


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
