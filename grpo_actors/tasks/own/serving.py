"""Serve functions of this program to the processes of a run (`caller`), on a Unix socket in a folder of their own.

    a worker ─┐  {"token": …}, then requests (`answering`)       one thread reads each connection,
    a worker ─┼──────────────────────────────────────────►       one thread calls the functions: one call at a time, in
    evaluator ┘  ◄── {"turn": true} when the call begins,        the order in which they come
                     then the reply

A function that hangs cannot be ended here. Once it has taken longer than its limit, the calls that wait for it fail
with a line that names it.
"""

import hmac
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from grpo_actors.errors import RewardError, nearest
from grpo_actors.tasks.own.answering import EventLoop, Functions, Reply, Request, failure
from grpo_actors.tasks.own.caller import CALLER, bare_name
from grpo_actors.tasks.own.frames import receive, send
from grpo_actors.tasks.own.kinds import Kind
from grpo_actors.tasks.own.loading import checked

#: Seconds between two looks of a call that waits for its turn at whether the present one hangs.
LOOK_S = 0.2
TURN: Reply = {"turn": True}


@dataclass(frozen=True, slots=True)
class _Running:
    """The call that has its turn."""

    since_s: float
    timeout_s: float


class Serving:
    """Functions of this program, served until `close`. Nobody but this user can reach them, and only with the token."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        """`functions`: name -> function; the settings call it ``caller:NAME``.

        Raises:
            RewardError: There can be no socket in the system's temporary folder.
        """
        self._functions = dict(functions)
        self._loop = EventLoop()
        self._token = secrets.token_hex(16)
        self._folder = Path(tempfile.mkdtemp(prefix="grpo-actors-caller-"))  # of mode 0700
        self._listener = socket.socket(socket.AF_UNIX)
        self._connections: set[socket.socket] = set()
        self._calls: SimpleQueue[tuple[Future[Reply], Callable[[], Reply]] | None] = SimpleQueue()
        self._running: _Running | None = None
        self._closed = False
        try:
            self._listener.bind(str(self._path))
        except OSError as error:
            self._listener.close()
            shutil.rmtree(self._folder)
            raise RewardError(
                f"no socket can be made at {self._path} ({error}); set TMPDIR to a shorter path"
            ) from None
        self._listener.listen()
        for loop in (self._accept, self._call):
            threading.Thread(target=loop, name=f"grpo-actors{loop.__name__}", daemon=True).start()

    @property
    def address(self) -> str:
        """Token and path, for the environment variable `caller.ADDRESS`."""
        return f"{self._token}@{self._path}"

    @property
    def _path(self) -> Path:
        return self._folder / CALLER

    def close(self) -> None:
        """Serve no longer; may be called twice. A call that has its turn goes on, and its result is dropped; no other is made."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError), socket.socket(socket.AF_UNIX) as waker:
            waker.connect(str(self._path))  # nothing else ends an `accept`
        for connection in tuple(self._connections):
            with suppress(OSError):  # its other side has just ended it
                connection.shutdown(socket.SHUT_RDWR)
        self._calls.put(None)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                connection, _ = self._listener.accept()
                self._connections.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer one connection until it ends."""
        # A process of the run may be killed at any moment, in the middle of a message too.
        with suppress(EOFError, OSError, ValueError), connection:
            token = str(receive(connection).get("token"))
            if not hmac.compare_digest(token.encode(errors="replace"), self._token.encode()):
                return
            functions = Functions(self._find, self._loop)
            while not self._closed:
                request = receive(connection)
                if "load" in request:
                    send(connection, functions.answer(request))
                else:
                    self._answer_in_turn(connection, functions, request)
        self._connections.discard(connection)

    def _answer_in_turn(self, connection: socket.socket, functions: Functions, request: Request) -> None:
        def call() -> Reply:
            self._running = _Running(time.monotonic(), functions.timeout_s)
            with suppress(OSError):  # the process that waited for it has ended
                send(connection, TURN)
            return functions.answer(request)

        future: Future[Reply] = Future()
        self._calls.put((future, call))
        while not wait([future], LOOK_S).done:
            # After `close` the call is not made any more, so that it would wait for ever.
            if self._closed and future.cancel():
                return
            if (reason := self._stuck()) and future.cancel():
                send(connection, {"failure": reason})
                return
        send(connection, future.result())

    def _call(self) -> None:
        """Make the calls, one after another, in this thread."""
        while (waiting := self._calls.get()) is not None:
            future, call = waiting
            if not self._closed and future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                # SystemExit, a CancelledError of asyncio: this thread makes all calls, so it must not end.
                except BaseException as error:  # noqa: BLE001 - the outermost frame of the user's code
                    future.set_result(failure(error))
                finally:
                    self._running = None
        self._loop.close()

    def _stuck(self) -> str:
        """Return a line if the present call takes longer than it may; else an empty text."""
        running = self._running
        taken_s = 0.0 if running is None else time.monotonic() - running.since_s
        if running is None or taken_s <= running.timeout_s:
            return ""
        return (
            f"did not get its turn: an earlier call has taken {taken_s:.0f} s in the program that started the run "
            f"(reward_timeout_s is {running.timeout_s:g}), and only one call runs there at a time"
        )

    def _find(self, spec: str, kind: Kind) -> Callable[..., Any]:
        name = bare_name(spec)
        if name not in self._functions:
            known = nearest(name, self._functions, show=repr)
            raise RewardError(f"the program that started the run was given no function {name!r}{known}")
        return checked(self._functions[name], name, kind)
