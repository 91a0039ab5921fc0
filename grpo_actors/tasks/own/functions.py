"""A user's own rewards, or own environment, run in one child process that can be killed.

A thread or a pool with a time-out cannot end a function that hangs, and a crash would take the worker
along. So all own rewards of a run share one child (`own_reward_child`), which is killed when a call takes
too long, and replaced whenever it is gone: one call fails, the next one works. While nothing fails,
a call costs about as much as sending its texts through a socket twice.
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

#: Loading runs the imports of the user's file, and those of PyTorch alone can take 20 s on a cold disk.
LOAD_TIMEOUT_S = 120.0

#: A process whose socket is closed has exited or is about to; a core dump may hold it up.
EXIT_TIMEOUT_S = 2.0

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


class OwnFunctions:
    """The functions of one kind (a key of `KINDS`) named by ``file.py:function`` or ``module:function``. Not safe to share among threads.

    Raises RewardError, in one line, where one cannot be loaded within `load_timeout_s`. The child leads
    a process group of its own: Ctrl-C does not reach it, and what it starts ends with it. It ends when
    this process does, however that ends.
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
        #: Per loaded function the arguments that it takes, None for any.
        self._accepts: list[list[str] | None] = []
        for spec in specs:
            _check_form(spec, KINDS[kind].setting)
        try:
            self._start()
            self._finish_loading()
        except BaseException:
            self.close()
            raise

    def call(self, index: int, arguments: Mapping[str, Any]) -> Any:
        """What `specs[index]` returns, as its kind checks it.

        Of `arguments` the function gets those that it takes by name. Raises RewardError where it raises,
        hangs, crashes or returns what the kind does not allow; the message's first line says which,
        and a traceback may follow.
        """
        try:
            if self._child is None:
                self._start()
            self._finish_loading()
            names = self._accepts[index]
            taken = {name: value for name, value in arguments.items() if names is None or name in names}
            deadline_s = time.monotonic() + self._timeout_s
            self._send({"call": index, "arguments": taken}, deadline_s)
            reply = self._receive(deadline_s, f"took more than {self._timeout_s:g} s (reward_timeout_s)")
            return KINDS[self._kind].check(reply.get("result"), arguments)
        except RewardError:
            if self._child is None:  # it loads while the next group is being sampled
                with suppress(RewardError):
                    self._start()
            raise
        except BaseException:  # interrupted: the answer, still on its way, must not meet the next question
            self.close()
            raise

    def close(self) -> None:
        """End the child and whatever it started, at once."""
        if self._child is not None:
            # macOS answers PermissionError where only a zombie is left in the group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        if self._channel is not None:
            self._channel.close()
        self._child = self._channel = None
        self._accepts = []

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
                    [sys.executable, "-m", "grpo_actors.tasks.own.child", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a reward prints is for people; the socket carries the results
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
        for spec in self._specs[len(self._accepts) :]:
            try:
                reply = self._receive(deadline_s, f"took more than {self._load_timeout_s:g} s to load")
            except RewardError as error:
                self.close()  # a child that lacks one reward is of no use for the others
                raise RewardError(
                    f"{KINDS[self._kind].setting}: {spec!r} cannot be loaded: {str(error).splitlines()[0]}"
                ) from error
            self._accepts.append(reply["accepts"])

    def _send(self, request: dict[str, Any], deadline_s: float) -> None:
        assert self._channel is not None
        try:
            send(self._channel, request, deadline_s)
        except (TypeError, ValueError) as error:  # nothing was sent
            raise RewardError(f"a column of the data cannot be handed over as JSON: {error}") from error
        except OSError:
            return  # it is gone or stuck: `_receive` finds out which

    def _receive(self, deadline_s: float, too_late: str) -> dict[str, Any]:
        """The child's next reply; RewardError, and no child any more, where none comes."""
        assert self._channel is not None
        try:
            reply = receive(self._channel, deadline_s)
        except TimeoutError:
            self.close()
            raise RewardError(f"{too_late}; its process was killed, the next call gets a new one") from None
        except (EOFError, OSError, ValueError):
            raise RewardError(f"{self._bury()}; the next call gets a new one") from None
        if "failure" in reply:
            raise RewardError("\n".join(filter(None, [reply["failure"], reply.get("traceback")])))
        return reply

    def _bury(self) -> str:
        """Close, and say how the child ended."""
        child = self._child
        assert child is not None
        # It closes its socket a little before it exits; killed in between, it would seem to be killed.
        with suppress(subprocess.TimeoutExpired):
            child.wait(EXIT_TIMEOUT_S)
        self.close()
        code = child.returncode
        how = f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"ended its process ({how})"


class UsesOwnFunctions:
    """What may have own functions to call: close it after use, or use it in a ``with`` block."""

    #: None: none were named, and there is no child.
    _own: OwnFunctions | None

    def close(self) -> None:
        """End the child process of own functions, if there is one; may be called twice."""
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_form(spec: str, setting: str) -> None:
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise RewardError(f'{setting}: {spec!r} must have the form "file.py:function" or "module:function"')


def search_path() -> str:
    """The child finds this package where this process found it, installed or not."""
    inherited = os.environ.get("PYTHONPATH")
    return f"{_PACKAGE_PARENT}{os.pathsep}{inherited}" if inherited else _PACKAGE_PARENT
