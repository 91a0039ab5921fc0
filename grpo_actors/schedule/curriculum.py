"""Which problems are posed when their turn comes: those of middling success more often than others.

A group whose completions are all right or all wrong has no signal; the variance of a reward of 0 or 1,
p (1 − p) at the success rate p, is largest at a half. So a problem with rate p is posed in a share
c = max(floor, 4 p (1 − p)) of the epochs, and one that has never been posed in the first.

No dice are thrown: with a phase φ of its own, a problem is posed in those epochs e in which φ + e · c passes a
whole number. That is a function of the epoch, the problem and its rate, spread evenly. It also ends: the
rate changes only when the problem is posed, so a skipped one is posed within ⌈1 / c⌉ ≤ ⌈1 / floor⌉ epochs, and a
search for the next problem passes over at most so many epochs.

Knows success rates by problem id; refuses to know positions, groups and time.
"""

from dataclasses import dataclass, field
from math import ceil

import xxhash

#: Weight of the newest group in a problem's rate: the policy has changed since the last epoch.
NEWEST = 0.5
#: Chances and phases are multiples of 2^-32, so that the sums are exact.
BITS = 32


@dataclass
class Curriculum:
    """Success rates, and what follows from them."""

    seed: int
    #: Least chance of a problem, in (0, 1].
    floor: float
    #: Problem id -> exponential mean of its share of right completions.
    rates: dict[str, float] = field(default_factory=dict)

    def poses(self, epoch: int, problem: str) -> bool:
        """Whether a problem is posed in an epoch, 0 or more, as far as is known now."""
        rate = self.rates.get(problem)
        if rate is None:
            return True
        # Rounded up: a floor below 2^-32 would be none.
        share = ceil(max(self.floor, 4.0 * rate * (1.0 - rate)) * (1 << BITS))
        phase: int = xxhash.xxh3_64_intdigest(f"{self.seed}/curriculum/{problem}".encode()) >> (64 - BITS)
        reached = phase + epoch * share
        return reached >> BITS > (reached - share) >> BITS

    def learn(self, problem: str, success: float) -> None:
        """A group of the problem was settled; `success` is its share of right completions."""
        rate = self.rates.get(problem, success)
        self.rates[problem] = rate + NEWEST * (success - rate)
