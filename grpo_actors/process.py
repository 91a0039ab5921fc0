"""How a process of this package starts and ends.

Start: follow the parent, take signals, bound the memory, hide the warnings of other packages. End: what an exception
becomes for a user. Imports nothing heavy, so that ``--help`` stays instant.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from grpo_actors.errors import GrpoActorsError

#: The supervisor puts the read end of a pipe here; it closes when the supervisor dies, however it dies.
LIFELINE = "GRPO_ACTORS_LIFELINE"
#: Bytes that MLX may use in this process: the supervisor divides the machine among its children.
MEMORY_LIMIT = "GRPO_ACTORS_MEMORY_LIMIT"

EXIT_USAGE = 2
#: What a shell reports for a process that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141

_PACKAGE = Path(__file__).parent
_show_any = warnings.showwarning


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


def _end_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1):
        warnings.showwarning = _show_own
    # Not sys.exit: the main thread may be in a computation that nothing interrupts.
    with contextlib.suppress(OSError):  # the pipe to the supervisor broke with it
        sys.stderr.flush()
    os._exit(1)


def hide_warnings_of_others() -> None:
    """Show only the warnings of this package and of the user's own files; may be called twice.

    Other packages' warnings, which a user cannot act on, would bury a command's own lines. That includes the
    SyntaxWarnings of a file that Python compiles: each time, if it keeps no bytecode. If the user asks for warnings,
    by -W, PYTHONWARNINGS or -X dev, all are shown as asked, and by the child processes too.
    """
    if sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = ",".join(sys.warnoptions)  # children do not inherit -W
    else:
        warnings.showwarning = _show_own


def _show_own(
    message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any
) -> None:
    """Take the place of `warnings.showwarning`, which Python calls with a warning that no filter stopped."""
    path = Path(filename)
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    generated = filename.startswith("<")  # by a library: sympy compiles what it reads
    if path.is_relative_to(_PACKAGE) or not (installed or generated):
        _show_any(message, category, filename, *rest, **named)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a tool and leave the process with its exit code.

    An error that this package raises on purpose becomes one line on stderr and exit code 2, Ctrl-C a
    quiet 130, a closed standard output (``| head``) a quiet 141. Any other exception is a defect and keeps its traceback.
    """
    hide_warnings_of_others()
    try:
        code = main()
        sys.stdout.flush()  # here, where a closed pipe can still be answered
    except GrpoActorsError as error:
        # The message may quote a user's text; a line break in it would make two lines.
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _output_is_closed():
            raise  # some other pipe of the tool broke
        code = EXIT_NO_READER
    sys.exit(code)


def _output_is_closed() -> bool:
    """Whether nobody reads standard output any more; if so, the interpreter's last flush goes to nowhere."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # errors and hang-ups are always reported
    closed = bool(poller.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
