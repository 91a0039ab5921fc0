"""A wait that is explained when it gets long: after half a minute, then each time it has doubled. Knows no clock.

Both sides of a run explain theirs. The learner knows of groups that were refused and of peers that were shut out
(`learner.exchange.standstill`), the supervisor of processes that start again, load their model or are silent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

#: Seconds of a wait after which it is explained for the first time.
LONG_WAIT_S = 30.0


@dataclass
class LongWait:
    """A wait, from its beginning to its end."""

    #: What is missing, as the first words of the explanation.
    missing: str
    _since_s: float | None = None
    _next_s: float = LONG_WAIT_S

    def end(self) -> None:
        """Note that what was missing has come; the next `explain` begins a new wait."""
        self._since_s = None

    def explain(self, now_s: float, reasons: Sequence[str]) -> str | None:
        """Return one line when it is due: what is missing, for how long, and why.

        Args:
            now_s: Seconds of any monotonic clock.
            reasons: Why the wait lasts; if empty, nothing is due yet.
        """
        if self._since_s is None:
            self._since_s, self._next_s = now_s, LONG_WAIT_S
        waited_s = now_s - self._since_s
        if waited_s < self._next_s or not reasons:
            return None
        self._next_s = 2 * waited_s
        return f"{self.missing} for {waited_s:.0f} s: {'; '.join(reasons)}"
