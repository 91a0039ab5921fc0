"""Run a user's own rewards or own environment in one child process that can be killed.

A thread or a pool with a time-out cannot end a function that hangs, and a crash would end the worker too. So the own
functions of each folder share a child (`own.child`), and files of the same name in two folders do not meet. A child is
killed when a call takes too long, and replaced when it is gone: one call fails, the next one works. Without failures, a
call costs about as much as sending its texts through a socket twice.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own.frames import receive, send
from grpo_actors.tasks.own.kinds import KINDS
from grpo_actors.tasks.own.loading import Signature
from grpo_actors.tasks.own.logs import Logs

#: Loading runs the imports of the user's file; PyTorch alone can take 20 s on a cold disk.
LOAD_TIMEOUT_S = 120.0

#: Seconds to wait for the exit of a process that has closed its socket; a core dump may delay it.
EXIT_TIMEOUT_S = 2.0

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


class OwnFunctions:
    """The functions named by `specs` (``file.py:function`` or ``module:function``), of one folder and kind (a key of `KINDS`).

    Raises a RewardError of one line if a function cannot be loaded within `load_timeout_s`. The child leads its own
    process group: Ctrl-C does not reach it, and processes that it starts end with it. It ends when this process ends,
    for any reason. Threads must not share an object.
    """

    def __init__(
        self, specs: Sequence[str], kind: str, *, timeout_s: float, load_timeout_s: float = LOAD_TIMEOUT_S
    ) -> None:
        self._specs = list(specs)
        self._kind = kind
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._signatures: list[Signature] = []
        for spec in specs:
            _check_form(spec, KINDS[kind].setting)
        try:
            self._start()
            self._finish_loading()
        except BaseException:
            self.close()
            raise

    def call(self, index: int, arguments: Mapping[str, Any], logs: Logs | None = None) -> Any:
        """Call the function `specs[index]` and return its result, checked by its kind.

        The function gets those of `arguments` that it takes by name. What it logs is added to `logs`. Raises RewardError
        if it raises, hangs, crashes or returns a value that the kind does not allow. The first line of the message gives
        the reason, and a traceback may follow.
        """
        try:
            if self._child is None:
                self._start()
            self._finish_loading()
            names = self._signatures[index].accepts
            taken = {name: value for name, value in arguments.items() if names is None or name in names}
            deadline_s = time.monotonic() + self._timeout_s
            self._send({"call": index, "arguments": taken}, deadline_s)
            reply = self._receive(deadline_s, f"took more than {self._timeout_s:g} s (reward_timeout_s)")
            if logs is not None:
                logs.add(reply)
            return KINDS[self._kind].check(reply.get("result"), arguments)
        except RewardError:
            if self._child is None:  # start a new child now: it loads while the next group is sampled
                with suppress(RewardError):
                    self._start()
            raise
        except BaseException:  # interrupted: the answer on its way must not be read as the next one
            self.close()
            raise

    def requires(self, index: int) -> list[str]:
        """Return the arguments without which the function `specs[index]` cannot be called."""
        return self._signatures[index].requires

    def close(self) -> None:
        """End the child and every process it started, at once."""
        if self._child is not None:
            # macOS raises PermissionError if only a zombie is left in the group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        if self._channel is not None:
            self._channel.close()
        self._child = self._channel = None
        self._signatures = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Start the child and ask it to load; `_finish_loading` collects the answers."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._child = subprocess.Popen(
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
        self._channel = ours
        for spec in self._specs:
            request = {"load": spec, "kind": self._kind, "timeout_s": self._timeout_s}
            self._send(request, time.monotonic() + self._load_timeout_s)

    def _finish_loading(self) -> None:
        deadline_s = time.monotonic() + self._load_timeout_s
        for spec in self._specs[len(self._signatures) :]:
            try:
                reply = self._receive(deadline_s, f"took more than {self._load_timeout_s:g} s to load")
            except RewardError as error:
                self.close()  # the run needs all functions, so this child is useless
                raise RewardError(
                    f"{KINDS[self._kind].setting}: {spec!r} cannot be loaded: {str(error).splitlines()[0]}"
                ) from error
            self._signatures.append(Signature(reply["accepts"], reply["requires"]))

    def _send(self, request: dict[str, Any], deadline_s: float) -> None:
        assert self._channel is not None
        try:
            send(self._channel, request, deadline_s)
        except (TypeError, ValueError) as error:  # nothing was sent
            raise RewardError(f"a column of the data cannot be passed as JSON: {error}") from error
        except OSError:
            return  # the child is gone or stuck: `_receive` finds out which

    def _receive(self, deadline_s: float, too_late: str) -> dict[str, Any]:
        """Return the child's next reply; if none comes, close the child and raise RewardError."""
        assert self._channel is not None
        try:
            reply = receive(self._channel, deadline_s)
        except TimeoutError:
            self.close()
            raise RewardError(f"{too_late}; its process was killed, the next call gets a new one") from None
        except (EOFError, OSError, ValueError):
            raise RewardError(f"{self._close_ended()}; the next call gets a new one") from None
        if "failure" in reply:
            raise RewardError("\n".join(filter(None, [reply["failure"], reply.get("traceback")])))
        return reply

    def _close_ended(self) -> str:
        """Close, and describe how the child ended."""
        child = self._child
        assert child is not None
        # The child closes its socket a little before it exits: wait, or `close` kills it and the signal hides its status.
        with suppress(subprocess.TimeoutExpired):
            child.wait(EXIT_TIMEOUT_S)
        self.close()
        code = child.returncode
        how = f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"ended its process ({how})"


class UsesOwnFunctions:
    """The base of objects that may call own functions: close them after use, or use them in a ``with`` block."""

    #: One for each folder; empty if no own functions were named: there is then no child.
    _own: Sequence[OwnFunctions]

    def close(self) -> None:
        """End the child processes of own functions, if there are any; may be called twice."""
        for functions in self._own:
            functions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def folder_of(spec: str) -> Path:
    """Return the folder whose functions share a process: that of the file, or for a module the current one."""
    source = Path(spec.rpartition(":")[0]).expanduser()
    return source.absolute().parent if source.suffix == ".py" else Path.cwd()


def _check_form(spec: str, setting: str) -> None:
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise RewardError(f'{setting}: {spec!r} must have the form "file.py:function" or "module:function"')


def search_path() -> str:
    """Return the PYTHONPATH with which a child imports this package from the same place, installed or not."""
    inherited = os.environ.get("PYTHONPATH")
    return f"{_PACKAGE_PARENT}{os.pathsep}{inherited}" if inherited else _PACKAGE_PARENT
