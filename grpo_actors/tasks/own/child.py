"""Run a user's own rewards or own environment in a process: ``python -m grpo_actors.tasks.own.child FD``.

The process may hang, exit, crash or use too much memory: `functions.OwnFunctions` starts and ends it. It answers one
request at a time over the socket that it inherits as FD:

    {"load": spec, "kind": kind, "timeout_s": seconds}  ->  {"accepts": [name, …], or null for every name}
    {"call": index, "arguments": {name: value}}         ->  {"result": what the kind allows}

The reply to either may also be ``{"failure": one line, "traceback": text or ""}``. Its standard output is the
parent's standard error, so that output of a reward can be read and is not mixed with anything else.
"""

import importlib
import importlib.util
import inspect
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_actors.backend import let_torch_into_transformers
from grpo_actors.errors import RewardError, nearest
from grpo_actors.tasks.own.frames import receive, send
from grpo_actors.tasks.own.kinds import KINDS, Kind

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
            return {"accepts": accepted_names(loaded)}
        arguments = request["arguments"]
        # A regular expression that never ends holds the interpreter's lock, so the thread that watches for the
        # parent's end cannot run. The kernel's timer still can.
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s + BACKSTOP_S)
        try:
            function, kind = self._functions[request["call"]]
            return {"result": kind.check(function(**arguments), arguments)}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def load(spec: str, kind: Kind) -> Callable[..., Any]:
    """Load the function that ``file.py:function`` or ``module:function`` names; raise RewardError if it is unusable."""
    source, _, name = spec.rpartition(":")
    module = _load_file(Path(source).expanduser()) if source.endswith(".py") else _load_module(source)
    if not hasattr(module, name):
        callables = [known for known, value in vars(module).items() if callable(value)]
        raise RewardError(f"{source} has no function {name!r}{nearest(name, callables, show=repr)}")
    function = getattr(module, name)
    if not callable(function):
        raise RewardError(f"must be a function, got {type(function).__name__}")
    if inspect.iscoroutinefunction(function):
        raise RewardError("must be a plain function, got an async one; run its coroutine with asyncio.run")
    names = accepted_names(function)
    if names is not None and kind.argument not in names:
        raise RewardError(
            f"must take the argument {kind.argument}, by name, got {name}{inspect.signature(function)}; "
            f"write {kind.signature}"
        )
    return function  # type: ignore[no-any-return]


def accepted_names(function: Callable[..., Any]) -> list[str] | None:
    """Return the names of the arguments that the function takes; None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C have no signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in by_name]


def _load_file(path: Path) -> ModuleType:
    path = path.absolute()
    module_name = f"own_reward_{path.stem}"
    known = sys.modules.get(module_name)
    if known is not None and known.__file__ == str(path):
        return known  # so that two functions of one file share its state
    if not path.is_file():
        raise RewardError(f"there is no file {path}; a relative one is looked up from the current folder")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs, because its dataclasses look themselves up there
    sys.path.insert(0, str(path.parent))  # as for a script, so that it can import other files of its folder
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its own imports is missing
        raise RewardError(
            f"there is no module {name!r}; for a file write its path, such as {name}.py:function"
        ) from None


def failure(error: Exception) -> dict[str, str]:
    """Return the reply for an error of the user's code: type, message and place in one line, then the traceback."""
    if isinstance(error, RewardError):
        return {"failure": str(error), "traceback": ""}
    whole = traceback.TracebackException.from_exception(error)
    # The indented source lines of a SyntaxError come before its message; notes come after it.
    message = next(part for part in whole.format_exception_only() if not part.startswith(" "))
    reason = " ".join(message.split())
    place = f" ({whole.stack[-1].filename}:{whole.stack[-1].lineno})" if whole.stack else ""
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


def _offer_to_out_of_memory_killer() -> None:
    """Ask Linux to kill this process, rather than the one that trains, if memory runs out."""
    with suppress(OSError):  # the file does not exist on macOS and is read-only in some containers
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Answer requests until the parent is gone."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.dont_write_bytecode = True  # no __pycache__ in the user's folders
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
