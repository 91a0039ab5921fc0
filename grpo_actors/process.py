"""Set up a process of this package, and end it.

Setup: follow the parent, handle signals, bound the memory, hide the warnings of other packages, print to whatever
terminal there is or is not. End: turn an exception into one line and an exit code. Imports nothing heavy, so that
``--help`` stays instant.
"""

import contextlib
import faulthandler
import io
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from grpo_actors.errors import GrpoActorsError
from grpo_actors.out_of_memory import Role, is_out_of_memory, refusal

#: Environment variable with the descriptor of a pipe's read end. The supervisor holds the write end, so the pipe closes
#: when the supervisor dies, for whatever reason.
LIFELINE = "GRPO_ACTORS_LIFELINE"
#: Environment variable with the descriptor of a pipe's read end, for the learner (`keeps_evaluator`).
EVALUATOR_LINE = "GRPO_ACTORS_EVALUATOR_LINE"
#: Environment variables: bytes that MLX may use in this process, and those of freed arrays that it may keep for reuse.
#: The supervisor divides the memory among its children; 0 or not set: the defaults of `bound_memory`.
MEMORY_LIMIT = "GRPO_ACTORS_MEMORY_LIMIT"
CACHE_LIMIT = "GRPO_ACTORS_CACHE_LIMIT"
#: Environment variable: further bytes that the learner may use while it writes a checkpoint in the background.
CHECKPOINT_ROOM = "GRPO_ACTORS_CHECKPOINT_ROOM"
#: Environment variable: the secret by which a run's own evaluator proves to the learner what it is (`take_secret`).
EVALUATOR_TOKEN = "GRPO_ACTORS_EVALUATOR_TOKEN"  # noqa: S105 - the variable's name
#: Without CACHE_LIMIT, MLX may keep freed arrays of 1 / CACHE_PARTS of its own memory limit, which is most of the device.
CACHE_PARTS = 16

#: Added to the nice value of a process that is not urgent. Linux gives nine such threads as much time as one of training:
#: enough to evaluate while training leaves no core idle, and too little to slow it down.
BACKGROUND_NICE = 10

#: Signal at which a process prints the stacks of all its threads to stderr, even while it hangs in a computation.
PRINT_STACKS = signal.SIGUSR1

#: Exit code for a crash: the supervisor starts the process again.
EXIT_CRASH = 1
#: Exit code for unusable input.
EXIT_USAGE = 2
#: Exit code of a learner or worker that has lost another of its ranks: the supervisor starts it again.
EXIT_RANK_LOST = 3
#: Exit codes that a shell reports for a process ended by a signal: 128 + SIGINT, 128 + SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141

_PACKAGE = Path(__file__).parent
_show_any = warnings.showwarning


class StopRequest:
    """A flag that the first signal sets and that a process's main loop checks. A second signal ends the process at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Ask the loop to stop."""
        self._event.set()


def take_secret(name: str) -> str:
    """Return the secret in an environment variable ("" if there is none), and hide it from the processes started here."""
    return os.environ.pop(name, "")


def is_supervised() -> bool:
    """Return whether the supervisor (launch.py) started this process."""
    return LIFELINE in os.environ


def keeps_evaluator() -> bool:
    """Return whether this process's supervisor, if it has one, keeps an evaluator: one that runs or will be started.

    The supervisor holds the write end of a pipe until its evaluator has ended for good. Nothing is written into it, so the
    read end becomes readable when it closes.
    """
    line = os.environ.get(EVALUATOR_LINE)
    return line is not None and not select.select([int(line)], [], [], 0)[0]


def enter_process() -> StopRequest:
    """Follow the parent and install the signal handlers; return the request that the signals set.

    Call this first in an actor's main, before anything slow is imported. A supervised process ignores Ctrl-C and a closed
    terminal: the supervisor decides, and sends SIGTERM. A process started by hand handles them.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if stop and number != signal.SIGHUP:
            leave(128 + number)
        stop.set()

    follow_parent()
    print_stacks_when_asked()
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, signal.SIG_IGN if is_supervised() else handle)
    if not ignores_hangup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_supervised() else handle)
    return stop


def ignores_hangup() -> bool:
    """Return whether this process was told to outlive its terminal, as by nohup."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def follow_parent() -> None:
    """Make this process end when its supervisor ends, if it has one. May be called twice."""
    if is_supervised() and not any(thread.name == LIFELINE for thread in threading.enumerate()):
        lifeline = int(os.environ[LIFELINE])
        threading.Thread(target=_end_with_parent, args=(lifeline,), name=LIFELINE, daemon=True).start()


def print_stacks_when_asked() -> None:
    """Print the stacks of all threads at each `PRINT_STACKS`, without Python's help. May be called twice."""
    faulthandler.register(PRINT_STACKS, all_threads=True)


def bound_memory() -> None:
    """Limit MLX to this process's share of memory, and the freed arrays that it keeps, on every back end.

    MLX's own limits are most of the device, for each process. A Mac panics if several processes each wire that much, and on
    CUDA one of them runs out of memory, because arrays of ever new sizes are freed and kept. Above the memory limit MLX
    first releases what it keeps, then computes no further ahead. It refuses nothing: a process that needs more gets it.
    """
    import mlx.core as mx  # noqa: PLC0415 - only processes that compute load MLX

    if mx.default_device().type == mx.DeviceType.gpu:  # on a CPU, MLX keeps 32 MiB
        mx.set_cache_limit(int(os.environ.get(CACHE_LIMIT, "0")) or mx.get_memory_limit() // CACHE_PARTS)
    limit = int(os.environ.get(MEMORY_LIMIT, "0"))
    if not limit:
        return
    mx.set_memory_limit(limit)
    if mx.metal.is_available():
        most = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(min(limit, most))


def _end_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    # Not sys.exit: the main thread may be in a computation that nothing interrupts.
    with contextlib.suppress(OSError):  # the pipe to the supervisor broke with it
        sys.stderr.flush()
    leave(EXIT_CRASH)


#: What `leave` calls.
_removals: list[Callable[[], None]] = []


@contextlib.contextmanager
def removed_at_once(remove: Callable[[], None]) -> Iterator[None]:
    """Call `remove` if this process ends at once within the block: by a second signal, or with its supervisor.

    No ``finally`` runs then. `remove` may be called while the main thread is in any state, so it only removes files.
    """
    _removals.append(remove)
    try:
        yield
    finally:
        _removals.remove(remove)


def leave(code: int) -> NoReturn:
    """End this process at once, without its files."""
    for remove in _removals:
        with contextlib.suppress(OSError):  # the others are to be removed all the same
            remove()
    os._exit(code)


def hide_warnings_of_others() -> None:
    """Show only the warnings of this package and of the user's own files. May be called twice.

    A user cannot act on other packages' warnings, and they would bury a command's own lines. This includes the
    SyntaxWarnings of a file that Python compiles, which come at every start if Python keeps no bytecode. If the user
    asks for warnings with -W, PYTHONWARNINGS or -X dev, this process and its children show them as asked.
    """
    if sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = ",".join(sys.warnoptions)  # children do not inherit -W
    else:
        warnings.showwarning = _show_own


def _show_own(
    message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any
) -> None:
    """Replace `warnings.showwarning`, which Python calls with each warning that passed the filters."""
    path = Path(filename)
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    generated = filename.startswith("<")  # code that a library generated: sympy compiles the text it parses
    if path.is_relative_to(_PACKAGE) or not (installed or generated):
        _show_any(message, category, filename, *rest, **named)


class _Lenient(io.TextIOWrapper):
    """Text output that drops what its terminal or reader does not take, from the first failure on."""

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        with self._dropping():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        with self._dropping():
            super().flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass  # another process made the terminal non-blocking; it takes more later
        except OSError:
            _discard(self.fileno())


def prepare_output(*, lenient_stdout: bool = False) -> None:
    """Make standard output and error take every text on any terminal, and none; call it before the first output.

    What an encoding lacks is written as an escape. Standard error never fails: a terminal that was closed or a reader that
    has left must change nothing else. Nor does standard output, if `lenient_stdout`. A descriptor that the caller closed
    becomes the null device: a socket with its number would get what is printed.
    """
    missing = [descriptor for descriptor in (0, 1, 2) if not _is_open(descriptor)]
    for descriptor in missing:
        # The lowest free number is taken, so this is it.
        os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
        os.set_inheritable(descriptor, True)
    if 1 in missing:
        sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
    if 2 in missing:
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
    sys.stdout = _prepared(sys.stdout, lenient=lenient_stdout)
    sys.stderr = _prepared(sys.stderr, lenient=True)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _prepared(stream: TextIO, *, lenient: bool) -> TextIO:
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream  # another program, such as a test, has put its own in place
    stream.reconfigure(errors="backslashreplace")
    if not lenient:
        return stream
    unbuffered = stream.write_through  # python -u
    return _Lenient(
        stream.buffer, stream.encoding, "backslashreplace", line_buffering=True, write_through=unbuffered
    )


def _discard(descriptor: int) -> None:
    """Send all further output of a descriptor to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def run_command(main: Callable[[], int], role: Role | None = None) -> NoReturn:
    """Run a command and leave the process with its exit code.

    An error that this package raises on purpose becomes one line on stderr and exit code 2. In an actor, which gives its
    `role`, a lack of memory becomes one line with the settings to lower, and exit code 1. Ctrl-C becomes exit code
    130, and a closed standard output (``| head``) 141, both without output. Any other exception is a defect and keeps
    its traceback.
    """
    prepare_output()
    hide_warnings_of_others()
    try:
        code = main()
        sys.stdout.flush()  # here, where a closed pipe can still be handled
    except (GrpoActorsError, RuntimeError, MemoryError) as error:
        if role is not None and is_out_of_memory(error):
            print("error: " + refusal(error, role), file=sys.stderr, flush=True)
            leave(EXIT_CRASH)  # CUDA may hang or abort in MLX's destructors now
        if not isinstance(error, GrpoActorsError):
            raise
        # The message may quote a user's text, and a line break in it would make two lines.
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _output_is_closed():
            raise  # another pipe of the command broke
        code = EXIT_NO_READER
    sys.exit(code)


def _output_is_closed() -> bool:
    """Return whether standard output has lost its reader. If so, send the interpreter's last flush to the null device."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # errors and hang-ups are always reported
    closed = bool(poller.poll(0))
    if closed:
        _discard(sys.stdout.fileno())
    return closed
