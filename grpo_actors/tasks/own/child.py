"""Run a user's own rewards or own environment in a process: ``python -m grpo_actors.tasks.own.child FD``.

The process may hang, exit, crash or use too much memory: `child_process.ChildProcess` starts and ends it. It answers one
request at a time (`answering`) over the socket that it inherits as FD. Its standard output is the parent's standard error, so
that output of a reward can be read and is not mixed with anything else.
"""

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo_actors.backend import let_torch_into_transformers
from grpo_actors.process import prepare_output
from grpo_actors.tasks.own.answering import EventLoop, Functions, Request
from grpo_actors.tasks.own.frames import receive, send
from grpo_actors.tasks.own.loading import load

#: Seconds after its time-out at which the kernel ends a call, in case the parent can no longer end it.
BACKSTOP_S = 2.0


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Have the kernel end this process if the block takes longer.

    A regular expression that never ends holds the interpreter's lock, so the thread that watches for the parent's end
    cannot run. The kernel's timer still can.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _read_requests(channel: socket.socket, requests: "queue.SimpleQueue[Request]") -> None:
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
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(channel, requests), daemon=True).start()
    functions = Functions(load, EventLoop())
    while True:
        request = requests.get()
        if "load" in request:
            reply = functions.answer(request)
        else:
            with _ended_after(functions.timeout_s + BACKSTOP_S):
                reply = functions.answer(request)
        send(channel, reply)


if __name__ == "__main__":
    main()
