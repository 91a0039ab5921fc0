"""A limit on the warnings that peers cause, so that a peer that floods the learner fills neither its records nor the disk.

Time is an argument.
"""

from collections.abc import Iterator

#: Warnings let through in each period of PERIOD_S seconds: enough to see what is wrong.
WARNINGS = 20
PERIOD_S = 60.0
#: Characters kept of one warning.
MAX_CHARS = 1000


class Throttle:
    """The warnings of the current period."""

    def __init__(self) -> None:
        self._since_s = float("-inf")
        self._seen = 0

    def let_through(self, text: str, now_s: float) -> Iterator[str]:
        """Yield the lines to record for a warning: itself, cut to `MAX_CHARS`, or none if there were too many of late."""
        if now_s - self._since_s > PERIOD_S:
            if self._seen > WARNINGS:
                yield f"{self._seen - WARNINGS} more warnings about peers were left out"
            self._since_s, self._seen = now_s, 0
        self._seen += 1
        if self._seen <= WARNINGS:
            yield text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} …"
