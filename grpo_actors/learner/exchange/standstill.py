"""A standstill: the learner waits, and the groups that arrive are refused or their senders are shut out. Says why.

A run without workers, or with slow ones, is no standstill in this sense: other lines tell of those. No socket; time is an
argument.
"""

from collections.abc import Mapping

#: Seconds of waiting after which the reasons are given; they are given again each time the wait has doubled.
STANDSTILL_S = 30.0
#: Peers named in one line.
MAX_NAMED = 8


class Standstill:
    """What went wrong since the last group was accepted, peer by peer."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._since_s: float | None = None
        self._next_s = STANDSTILL_S

    def note(self, peer: str, reason: str) -> None:
        """Note what went wrong with a peer; the newest reason counts."""
        # The newest comes last. A stranger can use any number of names, so their number is bounded.
        self._reasons.pop(peer, None)
        self._reasons[peer] = reason
        if len(self._reasons) > MAX_NAMED:
            del self._reasons[next(iter(self._reasons))]

    def end(self) -> None:
        """A group was accepted: forget what went wrong before."""
        self._reasons.clear()
        self._since_s = None

    def explain(self, now_s: float, *, waits: bool, shut_out: Mapping[str, str]) -> str | None:
        """Return one line that says why no group arrives, when it is due; None: nothing to say now.

        Args:
            now_s: Seconds of any monotonic clock.
            waits: Whether the learner waits for a group.
            shut_out: Peer -> why it gets no leases at present.
        """
        if not waits or self._since_s is None:
            self._since_s, self._next_s = (now_s if waits else None), STANDSTILL_S
            return None
        waited_s, reasons = now_s - self._since_s, {**self._reasons, **shut_out}
        if waited_s < self._next_s or not reasons:
            return None
        self._next_s = 2 * waited_s
        named = [f"{peer}: {reason}" for peer, reason in list(reasons.items())[-MAX_NAMED:]]
        return f"no group was accepted for {waited_s:.0f} s; {'; '.join(named)}"
