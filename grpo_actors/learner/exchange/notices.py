"""What the exchange tells the user: warnings in a bounded number, alarms, and why no group arrives.

All of it goes into the journal.
"""

from collections.abc import Callable, Mapping

from grpo_actors.learner.exchange.standstill import Standstill
from grpo_actors.learner.exchange.throttle import Throttle
from grpo_actors.observe.sinks import Journal


class Notices:
    """The notices of one run."""

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._clock = clock
        self._warnings = Throttle()
        self._standstill = Standstill()
        #: Name and text of the alarm that the last update raised; None: it raised none.
        self.alarm_of_update: str | None = None

    def inform(self, text: str) -> None:
        """Record a line that the learner causes, so that their number is bounded."""
        self._journal.append("log", {"level": "info", "text": text})

    def warn(self, text: str) -> None:
        """Record a warning that a peer caused. A peer can cause any number, and of any length."""
        for line in self._warnings.let_through(text, self._clock()):
            self._journal.append("log", {"level": "warning", "text": line})

    def blame(self, peer: str, reason: str) -> None:
        """Note what went wrong with a peer: it is told if no group is accepted for long."""
        self._standstill.note(peer, reason)

    def set_aside(self, lease: int, problem_id: str) -> None:
        """Raise the alarm that a problem is left out for good."""
        text = (
            f"{problem_id}: three attempts failed (a worker died, timed out, or sent a group that was refused); "
            f"it is left out (lease {lease})"
        )
        self._journal.append("alarm", {"name": "problem set aside", "text": text})

    def alarm(self, name: str, text: str, update: int) -> None:
        """Raise an alarm that belongs to an update."""
        self._journal.append("alarm", {"name": name, "text": text, "update": update})
        self.alarm_of_update = self.alarm_of_update or f"{name}: {text}"

    def group_accepted(self) -> None:
        """Forget what went wrong before a group was accepted."""
        self._standstill.end()

    def explain_standstill(self, now_s: float, *, waits: bool, shut_out: Mapping[str, str]) -> None:
        """Record why no group arrives, when that is due (`Standstill.explain`)."""
        text = self._standstill.explain(now_s, waits=waits, shut_out=shut_out)
        if text is not None:
            self._journal.append("log", {"level": "warning", "text": text})
