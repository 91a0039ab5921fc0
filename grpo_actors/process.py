"""What every actor's process does at its door: follow its parent, heed signals, bound its memory."""

import os
import signal
import sys
import threading
from types import FrameType

#: The supervisor puts the read end of a pipe here; it closes when the supervisor dies, however it dies.
LIFELINE = "GRPO_ACTORS_LIFELINE"
#: Bytes that MLX may use in this process: the supervisor divides the machine among its children.
MEMORY_LIMIT = "GRPO_ACTORS_MEMORY_LIMIT"


class StopRequest:
    """Set by the first signal; the loop that makes progress looks at it. A second signal ends at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()


def enter_process() -> StopRequest:
    """Call first in an actor's main: returns what the signals set.

    A supervised process ignores Ctrl-C, which the terminal sends to the whole group: the supervisor
    decides, and sends SIGTERM. A process started by hand heeds both.
    """
    stop = StopRequest()

    def heed(number: int, frame: FrameType | None) -> None:
        del frame
        if stop:
            os._exit(128 + number)
        stop.set()

    supervised = LIFELINE in os.environ
    signal.signal(signal.SIGTERM, heed)
    signal.signal(signal.SIGINT, signal.SIG_IGN if supervised else heed)
    if supervised:
        threading.Thread(target=_end_with_parent, args=(int(os.environ[LIFELINE]),), daemon=True).start()
    return stop


def bound_memory() -> None:
    """Keep MLX within this process's share: several processes that each wire most of a Mac panic it."""
    limit = int(os.environ.get(MEMORY_LIMIT, "0"))
    if limit:
        import mlx.core as mx  # noqa: PLC0415 - only processes that compute load MLX

        mx.set_memory_limit(limit)
        if mx.metal.is_available():
            mx.set_wired_limit(limit)


def _end_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    # Not sys.exit: the main thread may be in a computation that nothing interrupts.
    sys.stderr.flush()
    os._exit(1)
