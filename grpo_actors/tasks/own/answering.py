"""Answer the requests of `functions.OwnFunctions`: load a user's function, call it.

    {"load": spec, "kind": kind, "timeout_s": seconds}  ->  {"accepts": [name, …], or null: any, "requires": [name, …]}
    {"call": index, "arguments": {name: value}}         ->  {"result": what the kind allows}, and what it logged (`logs`)

The reply to either may also be ``{"failure": one line, "traceback": text or ""}``. Who answers is a process that can be
killed (`child`), or the program that started the run (`serving`).
"""

import inspect
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own.kinds import KINDS, Kind, completion_count
from grpo_actors.tasks.own.loading import signature_of
from grpo_actors.tasks.own.logs import Logs

if TYPE_CHECKING:
    import asyncio

#: A longer traceback loses its beginning.
MAX_TRACEBACK_CHARACTERS = 4000

Request = dict[str, Any]
Reply = dict[str, Any]


class EventLoop:
    """The one event loop of all async functions: a client that a function keeps, such as an HTTP session, belongs to its loop."""

    _runner: "asyncio.Runner | None" = None

    def run(self, result: Awaitable[Any]) -> Any:
        """Wait for the result of an async function."""
        import asyncio  # noqa: PLC0415 - most functions are not async

        async def awaited() -> Any:
            return await result

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(awaited())

    def close(self) -> None:
        """Close it, in the thread in which its functions ran."""
        if self._runner is not None:
            self._runner.close()


class Functions:
    """The functions that one client has loaded."""

    def __init__(self, find: Callable[[str, Kind], Callable[..., Any]], loop: EventLoop) -> None:
        """`find`: Returns the function of a spec, and raises RewardError if it is unusable."""
        self._find = find
        self._loop = loop
        self._functions: list[tuple[Callable[..., Any], Kind]] = []
        #: Limit of one call, in seconds; the client keeps it.
        self.timeout_s = 0.0

    def answer(self, request: Request) -> Reply:
        """Return the reply to a request."""
        try:
            return self._load(request) if "load" in request else self._call(request)
        except Exception as error:  # noqa: BLE001 - the outermost frame of the user's code: the client gets it as text
            return failure(error)

    def _load(self, request: Request) -> Reply:
        self.timeout_s = request["timeout_s"]
        kind = KINDS[request["kind"]]
        found = self._find(request["load"], kind)
        self._functions.append((found, kind))
        return asdict(signature_of(found))

    def _call(self, request: Request) -> Reply:
        function, kind = self._functions[request["call"]]
        arguments = request["arguments"]
        logs = Logs(completion_count(arguments))
        result = function(**kind.complete(arguments, logs))
        if inspect.isawaitable(result):
            result = self._loop.run(result)
        return {"result": kind.check(result, arguments), **logs.as_reply()}


def failure(error: BaseException) -> dict[str, str]:
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
