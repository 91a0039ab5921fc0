"""A standstill: the learner waits, and the groups that arrive are refused or their senders are shut out. Says why.

A run without workers, or with slow ones, is no standstill in this sense: other lines tell of those. No socket; time is an
argument.
"""

from collections.abc import Mapping

from grpo_actors.long_wait import LongWait

#: Peers named in one line.
MAX_NAMED = 8


class Standstill:
    """What went wrong since the last group was accepted, peer by peer."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._wait = LongWait("no group was accepted")

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
        self._wait.end()

    def explain(self, now_s: float, *, waits: bool, shut_out: Mapping[str, str]) -> str | None:
        """Return one line that says why no group arrives, when it is due; None: nothing to say now.

        Args:
            now_s: Seconds of any monotonic clock.
            waits: Whether the learner waits for a group.
            shut_out: Peer -> why it gets no leases at present.
        """
        if not waits:
            self._wait.end()
            return None
        named = [f"{peer}: {reason}" for peer, reason in {**self._reasons, **shut_out}.items()]
        return self._wait.explain(now_s, named[-MAX_NAMED:])
