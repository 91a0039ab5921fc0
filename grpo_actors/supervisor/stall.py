"""Say why a run stands still, as far as its own processes show it. Knows no process and no clock.

The learner's records tell of groups that were refused and of peers that were shut out. This tells of the processes: one
that waits to be started again, still loads its model, or is silent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

#: Seconds without an update after which the troubles are named; they are named again each time the wait has doubled.
STALL_S = 30.0


@dataclass
class Stall:
    """The time since the last update."""

    _since_s: float | None = None
    _next_s: float = STALL_S

    def end(self) -> None:
        """Note an update."""
        self._since_s = None

    def explain(self, now_s: float, troubles: Mapping[str, str]) -> str | None:
        """Return a line when one is due.

        Args:
            now_s: Monotonic time.
            troubles: Process -> what keeps it from its work; empty if all of them work.
        """
        if self._since_s is None:
            self._since_s, self._next_s = now_s, STALL_S
        waited_s = now_s - self._since_s
        if waited_s < self._next_s or not troubles:
            return None
        self._next_s = 2 * waited_s
        named = "; ".join(f"{name} {trouble}" for name, trouble in troubles.items())
        return f"no update for {waited_s:.0f} s: {named}"
