"""The outermost frame of every command-line tool: what an exception becomes for a user.

Imports nothing heavy, so that ``--help`` stays instant.
"""

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from grpo_actors.errors import GrpoActorsError

EXIT_USAGE = 2
#: What a shell reports for a process that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a tool and leave the process with its exit code.

    An error that this package raises on purpose becomes one line on stderr and exit code 2, Ctrl-C a
    quiet 130, a closed standard output (``| head``) a quiet 141. Any other exception is a defect and keeps its traceback.
    """
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
