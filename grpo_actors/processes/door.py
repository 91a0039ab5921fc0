"""What every actor's process does at its door: follow its parent, heed signals, bound its memory."""

import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from grpo_actors.errors import RunError

#: The supervisor puts the read end of a pipe here; it closes when the supervisor dies, however it dies.
LIFELINE = "GRPO_ACTORS_LIFELINE"
#: Bytes that MLX may use in this process: the supervisor divides the machine among its children.
MEMORY_LIMIT = "GRPO_ACTORS_MEMORY_LIMIT"
#: Descriptor of the run folder's lock, lent by the supervisor: held until both are gone.
LOCK = "GRPO_ACTORS_LOCK"

LOCK_FILE = "lock"


class StopRequest:
    """Set by the first signal; the loop that makes progress looks at it. A second signal ends at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Ask the loop to stop."""
        self._event.set()


def is_supervised() -> bool:
    """Whether launch.py started this process."""
    return LIFELINE in os.environ


def enter_process() -> StopRequest:
    """Call first in an actor's main, before anything slow is imported: returns what the signals set.

    A supervised process ignores Ctrl-C: the supervisor decides, and sends SIGTERM. A process started by
    hand heeds both.
    """
    stop = StopRequest()

    def heed(number: int, frame: FrameType | None) -> None:
        del frame
        if stop:
            os._exit(128 + number)
        stop.set()

    follow_parent()
    signal.signal(signal.SIGTERM, heed)
    signal.signal(signal.SIGINT, signal.SIG_IGN if is_supervised() else heed)
    return stop


def follow_parent() -> None:
    """End with the supervisor, if there is one; may be called twice."""
    if is_supervised() and not any(thread.name == LIFELINE for thread in threading.enumerate()):
        lifeline = int(os.environ[LIFELINE])
        threading.Thread(target=_end_with_parent, args=(lifeline,), name=LIFELINE, daemon=True).start()


def bound_memory() -> None:
    """Keep MLX within this process's share: several processes that each wire most of a Mac panic it.

    Not on CUDA: the share is one of the machine's memory, which says nothing about the GPU's own.
    """
    limit = int(os.environ.get(MEMORY_LIMIT, "0"))
    if not limit:
        return
    import mlx.core as mx  # noqa: PLC0415 - only processes that compute load MLX

    if mx.metal.is_available():
        mx.set_memory_limit(limit)
        mx.set_wired_limit(limit)
    elif mx.default_device().type == mx.DeviceType.cpu:
        mx.set_memory_limit(limit)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[int]:
    """Hold the run folder: a second ipc bind on one path would steal it silently.

    Yields the lock's descriptor. A process that inherits it holds the folder too, so a supervised
    learner, whose supervisor lent it, has nothing left to do.

    Raises:
        RunError: a live run holds it.
    """
    if LOCK in os.environ:
        yield int(os.environ[LOCK])
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"run.output_dir: {run_dir} is in use by a live run; stop it, or choose another folder"
            ) from None
        yield file.fileno()


def _end_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    # Not sys.exit: the main thread may be in a computation that nothing interrupts.
    with contextlib.suppress(OSError):  # the pipe to the supervisor broke with it
        sys.stderr.flush()
    os._exit(1)
