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
def time_limit(seconds: float, *, of_computing: bool = False) -> Iterator[None]:
    """Leave the block with TimeoutError after `seconds`. Works in the main thread only.

    Args:
        seconds: The limit.
        of_computing: Count the time that this process computes, in all threads, and not the time that passes. For code that
            cannot wait: a machine that is busy with other work is then no reason to end it.
    """
    timer, number = (
        (signal.ITIMER_PROF, signal.SIGPROF) if of_computing else (signal.ITIMER_REAL, signal.SIGALRM)
    )
    clock = time.process_time if of_computing else time.monotonic
    started_s = clock()
    handler = signal.signal(number, _expire)
    remaining_s, _ = signal.setitimer(timer, seconds)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError from None
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, handler)
        if remaining_s:
            signal.setitimer(timer, max(remaining_s - (clock() - started_s), 1e-3))
