"""Start and end the process in which a user's own functions run (`child`).

A thread or a pool with a time-out cannot end a function that hangs, and a crash would end the worker too. This process is
killed when a call takes too long, and replaced when it is gone. Without failures, a call costs about as much as sending
its texts through a socket twice.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from grpo_actors.errors import RewardError

#: Seconds to wait for the exit of a process that has closed its socket; a core dump may delay it.
EXIT_TIMEOUT_S = 2.0

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


class ChildProcess:
    """The place of the functions of one folder.

    The process leads its own process group: Ctrl-C does not reach it, and processes that it starts end with it. It ends
    when this process ends, for any reason.
    """

    takes_turns = False
    after_timeout = "its process was killed, the next call gets a new one"

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> socket.socket:
        """Start the process; return the channel to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    # -P: its modules are looked up where `own.loading` says, not in the current folder first.
                    [sys.executable, "-P", "-m", "grpo_actors.tasks.own.child", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # output that a reward prints goes to the terminal; the socket carries the results
                    pass_fds=[theirs.fileno()],
                    env=os.environ | {"PYTHONPATH": search_path()},
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise RewardError(f"its process could not be started: {error}") from error
        return ours

    def close(self) -> None:
        """End the process and every process it started, at once; may be called twice."""
        if self._process is not None:
            # macOS raises PermissionError if only a zombie is left in the group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def close_ended(self) -> str:
        """Close, and describe how the process ended."""
        process = self._process
        assert process is not None
        # It closes its socket a little before it exits: wait, or `close` kills it and the signal hides its status.
        with suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_TIMEOUT_S)
        self.close()
        code = process.returncode
        how = f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"ended its process ({how}); the next call gets a new one"


def search_path() -> str:
    """Return the PYTHONPATH with which a child imports this package from the same place, installed or not."""
    inherited = os.environ.get("PYTHONPATH")
    return f"{_PACKAGE_PARENT}{os.pathsep}{inherited}" if inherited else _PACKAGE_PARENT
