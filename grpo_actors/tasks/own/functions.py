"""Call a user's own rewards or own environment where they run: in one child process that can be killed, or in the caller.

The own functions of each folder share a child (`child_process`), and files of the same name in two folders do not meet. If
one call fails because the child is gone, the next one gets a new child. Functions of the program that started the run are
called there (`caller`).
"""

import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own.caller import CALLER, Caller, is_of_caller
from grpo_actors.tasks.own.child_process import ChildProcess
from grpo_actors.tasks.own.frames import receive, send
from grpo_actors.tasks.own.kinds import KINDS
from grpo_actors.tasks.own.loading import Signature
from grpo_actors.tasks.own.logs import Logs

#: Loading runs the imports of the user's file; PyTorch alone can take 20 s on a cold disk.
LOAD_TIMEOUT_S = 120.0
#: Longest wait for a turn, in seconds, below the 120 after which a worker that makes no progress is started again.
TURN_TIMEOUT_S = 60.0


class Place(Protocol):
    """Where functions run."""

    #: Whether calls of several processes wait for each other; a message then says that a call begins.
    takes_turns: bool
    #: What follows from a call that takes too long.
    after_timeout: str

    def open(self) -> socket.socket:
        """Return a new channel to the functions, or raise RewardError."""
        ...

    def close(self) -> None:
        """End what `open` has started; may be called twice."""
        ...

    def close_ended(self) -> str:
        """Close after the channel has ended by itself, and describe why it did."""
        ...


class OwnFunctions:
    """The functions named by `specs` (``file.py:function``, ``module:function``, ``caller:function``), of one place and kind.

    The kind is a key of `KINDS`. Raises a RewardError of one line if a function cannot be loaded within `load_timeout_s`.
    Threads must not share an object.
    """

    def __init__(
        self, specs: Sequence[str], kind: str, *, timeout_s: float, load_timeout_s: float = LOAD_TIMEOUT_S
    ) -> None:
        self._specs = list(specs)
        self._kind = kind
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._channel: socket.socket | None = None
        self._signatures: list[Signature] = []
        for spec in specs:
            _check_form(spec, KINDS[kind].setting)
        lives_in_caller = is_of_caller(self._specs[0])
        self._place: Place = Caller(specs, KINDS[kind].setting) if lives_in_caller else ChildProcess()
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
            if self._channel is None:
                self._start()
            self._finish_loading()
            names = self._signatures[index].accepts
            taken = {name: value for name, value in arguments.items() if names is None or name in names}
            self._send({"call": index, "arguments": taken}, time.monotonic() + self._timeout_s)
            if self._place.takes_turns:
                turn_s = max(TURN_TIMEOUT_S, self._timeout_s)
                self._receive(time.monotonic() + turn_s, f"did not get its turn within {turn_s:g} s")
            deadline_s = time.monotonic() + self._timeout_s
            reply = self._receive(deadline_s, f"took more than {self._timeout_s:g} s (reward_timeout_s)")
            if logs is not None:
                logs.add(reply)
            return KINDS[self._kind].check(reply.get("result"), arguments)
        except RewardError:
            if self._channel is None:  # start anew now: it loads while the next group is sampled
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
        """Close the channel, and end the child and every process it started, at once."""
        self._place.close()
        self._drop_channel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self._signatures = []

    def _start(self) -> None:
        """Open the channel and ask for the functions; `_finish_loading` collects the answers."""
        self._channel = self._place.open()
        for spec in self._specs:
            request = {"load": spec, "kind": self._kind, "timeout_s": self._timeout_s}
            self._send(request, time.monotonic() + self._load_timeout_s)

    def _finish_loading(self) -> None:
        deadline_s = time.monotonic() + self._load_timeout_s
        for spec in self._specs[len(self._signatures) :]:
            try:
                reply = self._receive(deadline_s, f"took more than {self._load_timeout_s:g} s to load")
            except RewardError as error:
                self.close()  # the run needs all functions, so the others are useless
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
            return  # the other side is gone or stuck: `_receive` finds out which

    def _receive(self, deadline_s: float, too_late: str) -> dict[str, Any]:
        """Return the next reply; if none comes, close and raise RewardError."""
        assert self._channel is not None
        try:
            reply = receive(self._channel, deadline_s)
        except TimeoutError:
            self.close()
            raise RewardError(f"{too_late}; {self._place.after_timeout}") from None
        except (EOFError, OSError, ValueError):
            reason = self._place.close_ended()
            self._drop_channel()
            raise RewardError(reason) from None
        if "failure" in reply:
            raise RewardError("\n".join(filter(None, [reply["failure"], reply.get("traceback")])))
        return reply


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


def place_of(spec: str) -> object:
    """Return what the functions of one place have in common: the folder of their files, for modules the current one."""
    if is_of_caller(spec):
        return CALLER
    source = Path(spec.rpartition(":")[0]).expanduser()
    return source.absolute().parent if source.suffix == ".py" else Path.cwd()


def _check_form(spec: str, setting: str) -> None:
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise RewardError(f'{setting}: {spec!r} must have the form "file.py:function" or "module:function"')
