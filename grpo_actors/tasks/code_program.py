"""Run a model's program and its tests in a process: ``python -I code_program.py FD``, one for each program.

`code_tests` starts, times and ends this process. It starts it by path, because the process must not depend on the
location of this package. The process limits itself, runs the program as a separate module, and only then asks for
the tests and for the token that goes with every verdict. It exchanges lines of JSON over the socket that it inherits
as FD:

    <- {"program": text, "seconds": wall time, "memory_bytes": …}
    -> {"ready": true}                     the program has run
    <- {"token": text, "tests": [text, …]}
    -> {"token": text, "test": index}      for each test that passed, in their order

A test without a verdict has failed. docs/howto/code-tests.md says what this process cannot prevent.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import socket
import sys
import types

#: Largest file that can be written.
FILE_BYTES = 16 * 2**20
#: Most open files at a time.
OPEN_FILES = 64
#: By convention, the id of the user that owns nothing.
NOBODY = 65534

_PR_SET_NO_NEW_PRIVS = 38
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def limit(seconds: float, memory_bytes: int) -> None:
    """Limit this process permanently: hard limits cannot be raised again."""
    if sys.platform == "linux":
        _drop_privileges()
    # The kernel's timer ends a sleeping program whose parent is gone; the limit on CPU time ends a busy one.
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    cpu_s = math.ceil(seconds)
    _set_limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
    _set_limit(resource.RLIMIT_AS, memory_bytes)
    _set_limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    _set_limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_NPROC, 0)  # no further process and, on Linux, no thread


def _set_limit(kind: int, soft: int, hard: int | None = None) -> None:
    # macOS has no limit on address space, and a lower limit may already be in force.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (soft, soft if hard is None else hard))


def _drop_privileges() -> None:
    """Give up root's privileges except for file access, and the network if the kernel allows it. Ignore failures."""
    libc = ctypes.CDLL(None)
    # RLIMIT_NPROC does not apply to the real user 0. The effective user stays, because it may own Python's files.
    with contextlib.suppress(OSError):  # not root
        os.setresuid(NOBODY, -1, -1)
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # This must be last: a process that creates a user namespace has every capability in it.
    header, nothing = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    libc.capset(header, nothing)


def main() -> None:
    """Run one program and its tests."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    lines = channel.makefile("r", encoding="ascii")
    request = json.loads(lines.readline())
    # Keep references: the program may replace any of these functions, in builtins or in their modules.
    run, compiled, send, read, as_json, from_json = (
        *(exec, compile, channel.sendall, lines.readline),
        *(json.dumps, json.loads),
    )
    failure = BaseException
    limit(request["seconds"], request["memory_bytes"])
    # Not __main__: the part of a script that runs only as a main program is not tested.
    module = sys.modules["program"] = types.ModuleType("program")
    run(compiled(request["program"], "program.py", "exec"), vars(module))
    send(b'{"ready": true}\n')
    verdict = from_json(read())
    for index, test in enumerate(verdict["tests"]):
        try:
            run(compiled(test, f"test {index}", "exec"), dict(vars(module)))
        except failure:  # a test that raises anything, even SystemExit, has not passed
            continue
        send(as_json({"token": verdict["token"], "test": index}).encode() + b"\n")


if __name__ == "__main__":
    main()
