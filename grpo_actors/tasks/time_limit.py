"""A limit on the time that one completion may take of a group's, in the process that runs the rewards of libraries.

Knows that this process has a timer already (`own_reward_child`), which must go on. What holds the interpreter's
lock, such as 9**9**9, is not ended by it but with the whole process, by `own_reward`.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType


class _OutOfTime(BaseException):
    """No Exception: libraries catch those and go on."""


def _expire(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _OutOfTime


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Leave the block with TimeoutError after `seconds`. In the main thread only."""
    started_s = time.monotonic()
    handler = signal.signal(signal.SIGALRM, _expire)
    remaining_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining_s:
            signal.setitimer(signal.ITIMER_REAL, max(remaining_s - (time.monotonic() - started_s), 1e-3))
