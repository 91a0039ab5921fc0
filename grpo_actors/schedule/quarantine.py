"""Decide which workers are quarantined: those whose log-probs the learner cannot confirm, update after update.

A worker reports the log-prob of every token that it samples, and the update computes it again. The *gap* of a token is
|learner − worker|, in nats. It is small where both compute the same policy, and large where a worker computes something
else or invents its numbers. It also grows with the *lag*: the versions between sampling and training. So a worker is
compared with the others at the same lag::

    lag 0: "a" 0.02, "b" 0.03, "c" 1.9      "c" is beyond its band: 4 times the lower median of the others is 0.08,
    lag 1: "a" 0.30, "b" 0.25               and `max_gap` = 0.1 is more than that, but not more than 1.9

Without another worker at that lag nothing tells a broken worker from a policy that moves fast; only a gap that no training
survives is then beyond the band.

Sums of numbers only: does not depend on tokens, texts or the clock.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median_low

#: Updates in a row beyond the band after which a worker is quarantined.
MAX_UPDATES_BEYOND = 3
#: The band, in multiples of the gap of the other workers.
BAND = 4.0
#: The band where there is no other worker, in multiples of `max_gap` and of 1 + lag.
BAND_ALONE = 10.0
#: Fewer tokens of a worker in an update are no evidence for or against it.
MIN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Gap:
    """The gap of a completion."""

    #: Versions between the policy that sampled it and the one that it trained.
    lag: int
    #: Sampled tokens, and their gaps added up.
    tokens: int
    nats: float

    def __add__(self, other: "Gap") -> "Gap":
        return Gap(self.lag, self.tokens + other.tokens, self.nats + other.nats)


@dataclass
class Quarantine:
    """How long each worker has been beyond its band."""

    #: health.max_logprob_gap, nats: a smaller mean gap is never beyond the band.
    max_gap: float
    _updates_beyond: dict[str, int] = field(init=False, default_factory=dict)

    def judge(self, gaps: Iterable[tuple[str, Gap]]) -> dict[str, str]:
        """Count one update, given its completions as (worker, gap); return worker -> reason of those to quarantine now."""
        by_lag: dict[int, dict[str, Gap]] = defaultdict(dict)
        for worker, gap in gaps:
            so_far = by_lag[gap.lag].get(worker, Gap(gap.lag, 0, 0.0))
            by_lag[gap.lag][worker] = so_far + gap
        found = {}
        for worker in {worker: None for of_lag in by_lag.values() for worker in of_lag}:
            own = [of_lag[worker] for of_lag in by_lag.values() if worker in of_lag]
            tokens = sum(gap.tokens for gap in own)
            if tokens < MIN_TOKENS:
                continue
            mean = sum(gap.nats for gap in own) / tokens
            limit = sum(gap.tokens * self._limit(worker, by_lag[gap.lag], gap.lag) for gap in own) / tokens
            if self._count(worker, beyond=mean > limit) == MAX_UPDATES_BEYOND:
                del self._updates_beyond[worker]
                found[worker] = (
                    f"log-probs {mean:.3g} nats off the learner's, {limit:.3g} at most, "
                    f"in {MAX_UPDATES_BEYOND} updates in a row"
                )
        return found

    def _limit(self, worker: str, of_lag: Mapping[str, Gap], lag: int) -> float:
        """Return the largest mean gap of a worker at a lag that is within its band."""
        others = [gap.nats / gap.tokens for name, gap in of_lag.items() if name != worker and gap.tokens]
        if not others:
            return BAND_ALONE * self.max_gap * (1 + lag)
        return max(self.max_gap, BAND * median_low(others))

    def _count(self, worker: str, *, beyond: bool) -> int:
        """Return for how many updates in a row a worker has been beyond its band."""
        count = self._updates_beyond.pop(worker, 0) + 1 if beyond else 0
        if beyond:
            self._updates_beyond[worker] = count
        else:
            self._updates_beyond.pop(worker, None)
        return count
