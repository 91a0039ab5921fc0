"""Decide which problems are posed when their turn comes: those with medium success rates more often than others.

A group whose completions are all right or all wrong has no signal; the variance of a reward of 0 or 1,
p (1 − p) at the success rate p, is largest at p = 1/2. So a problem with rate p is posed in a share
c = max(floor, 4 p (1 − p)) of the epochs. A problem that has never been posed is always posed.

The decision is not random: each problem has a fixed phase φ, and is posed in those epochs e in which φ + e · c
passes a whole number. So it depends only on the epoch, the problem and its rate, and is spread evenly. Example with
φ = 0 and c = 1/4:

    epoch e       1     2     3     4    5 …
    φ + e · c    0.25  0.50  0.75  1.00  1.25
    posed                           x             again in epoch 8

The search for the next problem always ends: a rate changes only when its problem is posed, so a skipped problem
is posed within ⌈1 / c⌉ ≤ ⌈1 / floor⌉ epochs, and the search passes over at most that many epochs.

This module depends on success rates by problem id only, not on positions, groups or time.
"""

from dataclasses import dataclass, field
from math import ceil

import xxhash

#: Weight of the newest group in a problem's rate; high, because the policy has changed since the last epoch.
NEWEST = 0.5
#: Bits of shares and phases: multiples of 2^-32, so that their sums are exact.
BITS = 32


@dataclass
class Curriculum:
    """The success rates of a run's problems, which decide when each is posed."""

    seed: int
    #: Least share of epochs in which a problem is posed, in (0, 1].
    floor: float
    #: Problem id -> exponential mean of its share of right completions.
    rates: dict[str, float] = field(default_factory=dict)

    def poses(self, epoch: int, problem: str) -> bool:
        """Return whether a problem is posed in an epoch, 0 or more, at its current rate."""
        rate = self.rates.get(problem)
        if rate is None:
            return True
        # Rounded up: a floor below 2^-32 must not become 0.
        share = ceil(max(self.floor, 4.0 * rate * (1.0 - rate)) * (1 << BITS))
        phase: int = xxhash.xxh3_64_intdigest(f"{self.seed}/curriculum/{problem}".encode()) >> (64 - BITS)
        reached = phase + epoch * share
        return reached >> BITS > (reached - share) >> BITS

    def record(self, problem: str, success: float) -> None:
        """Update the problem's rate with the result of a group; `success` is its share of right completions."""
        rate = self.rates.get(problem, success)
        self.rates[problem] = rate + NEWEST * (success - rate)
