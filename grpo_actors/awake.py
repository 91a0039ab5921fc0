"""A clock for limits on silence: a time in which this process was halted, as by Ctrl-Z, counts for none of them.

If a process and those that it watches were halted together, nobody had a chance to report.
"""

import time
from collections.abc import Callable

#: Longest time between two looks that counts, in seconds. Whoever asks for such a limit looks more often.
LONGEST_LOOK_S = 1.0


class AwakeClock:
    """Monotonic seconds without the time in which nobody looked at the clock. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_s = clock()
        self._seconds = 0.0

    def __call__(self) -> float:
        """Return the seconds since the clock was made."""
        now_s = self._clock()
        self._seconds += min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        return self._seconds
