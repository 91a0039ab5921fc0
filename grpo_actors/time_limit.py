"""Limit the time of Python code that somebody else wrote: a library reward, a chat template.

A timer that runs already continues afterwards: the process that runs library rewards has one for the whole group
(`tasks.own.child`). Code that holds the interpreter's lock, such as 9**9**9, is not ended by this limit: only its whole
process can be killed.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType


class _OutOfTime(BaseException):
    """The limit was reached. Not an Exception, because libraries catch those and continue."""


def _expire(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _OutOfTime


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Leave the block with TimeoutError after `seconds`. Works in the main thread only."""
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
