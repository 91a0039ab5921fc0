"""Run a user's own rewards or own environment in a process: ``python -m grpo_actors.tasks.own.child FD``.

The process may hang, exit, crash or use too much memory: `functions.OwnFunctions` starts and ends it. It answers one
request at a time over the socket that it inherits as FD:

    {"load": spec, "kind": kind, "timeout_s": seconds}  ->  {"accepts": [name, …], or null: any, "requires": [name, …]}
    {"call": index, "arguments": {name: value}}         ->  {"result": what the kind allows}, and what it logged (`logs`)

The reply to either may also be ``{"failure": one line, "traceback": text or ""}``. Its standard output is the
parent's standard error, so that output of a reward can be read and is not mixed with anything else.
"""

import inspect
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_actors.backend import let_torch_into_transformers
from grpo_actors.errors import RewardError
from grpo_actors.process import prepare_output
from grpo_actors.tasks.own.frames import receive, send
from grpo_actors.tasks.own.kinds import KINDS, Kind, completion_count
from grpo_actors.tasks.own.loading import load, signature_of
from grpo_actors.tasks.own.logs import Logs

if TYPE_CHECKING:
    import asyncio

#: Seconds after its time-out at which the kernel ends a call, in case the parent can no longer end it.
BACKSTOP_S = 2.0

#: A longer traceback loses its beginning.
MAX_TRACEBACK_CHARACTERS = 4000


class Functions:
    """The loaded functions, which answer requests."""

    def __init__(self) -> None:
        self._functions: list[tuple[Callable[..., Any], Kind]] = []
        self._timeout_s = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a request; an error of the user's code passes through."""
        if "load" in request:
            self._timeout_s = request["timeout_s"]
            kind = KINDS[request["kind"]]
            loaded = load(request["load"], kind)
            self._functions.append((loaded, kind))
            return asdict(signature_of(loaded))
        arguments = request["arguments"]
        # A regular expression that never ends holds the interpreter's lock, so the thread that watches for the
        # parent's end cannot run. The kernel's timer still can.
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s + BACKSTOP_S)
        try:
            function, kind = self._functions[request["call"]]
            logs = Logs(completion_count(arguments))
            result = function(**kind.complete(arguments, logs))
            if inspect.isawaitable(result):
                result = self._loop.run(_awaited(result))
            return {"result": kind.check(result, arguments), **logs.as_reply()}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @cached_property
    def _loop(self) -> "asyncio.Runner":
        """The one event loop of all calls: a client that a function keeps, such as an HTTP session, belongs to its loop."""
        import asyncio  # noqa: PLC0415 - most functions are not async

        return asyncio.Runner()


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def failure(error: Exception) -> dict[str, str]:
    """Return the reply for an error of the user's code: type, message and place in one line, then the traceback."""
    if isinstance(error, RewardError):
        return {"failure": str(error), "traceback": ""}
    whole = traceback.TracebackException.from_exception(error)
    # The indented source lines of a SyntaxError come before its message; notes come after it.
    message = next(part for part in whole.format_exception_only() if not part.startswith(" "))
    reason = " ".join(message.split())
    place = f" ({whole.stack[-1].filename}:{whole.stack[-1].lineno})" if whole.stack else ""
    # The frames of this file say nothing about the user's code.
    whole.stack = traceback.StackSummary.from_list(
        [frame for frame in whole.stack if frame.filename != __file__]
    )
    return {
        "failure": f"raised {reason:.500}{place}",
        "traceback": "".join(whole.format())[-MAX_TRACEBACK_CHARACTERS:],
    }


def _read_requests(channel: socket.socket, requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Queue incoming requests; when the parent is gone, end this process and every process it started."""
    try:
        while True:
            requests.put(receive(channel))
    finally:
        os.killpg(os.getpid(), signal.SIGKILL)  # the parent made this process the leader of its group


def _restore_python_path() -> None:
    """Remove the first folder of PYTHONPATH, with which only this process has to find the package."""
    _, _, inherited = os.environ.pop("PYTHONPATH", "").partition(os.pathsep)
    if inherited:
        os.environ["PYTHONPATH"] = inherited


def _offer_to_out_of_memory_killer() -> None:
    """Ask Linux to kill this process, rather than the one that trains, if memory runs out."""
    with suppress(OSError):  # the file does not exist on macOS and is read-only in some containers
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Answer requests until the parent is gone."""
    prepare_output(lenient_stdout=True)  # a function that prints must not fail because of it
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.dont_write_bytecode = True  # no __pycache__ in the user's folders
    _restore_python_path()
    _offer_to_out_of_memory_killer()
    let_torch_into_transformers()  # a reward may be a model
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(channel, requests), daemon=True).start()
    functions = Functions()
    while True:
        request = requests.get()
        try:
            reply = functions.answer(request)
        except Exception as error:  # noqa: BLE001 - the outermost frame: the parent gets the error as text
            reply = failure(error)
        send(channel, reply)


if __name__ == "__main__":
    main()
