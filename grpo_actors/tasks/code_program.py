"""The process in which a model's program meets its tests: ``python -I code_program.py FD``, one for each program.

Started, timed and ended by `code_tests`, and by path: it must not depend on where this package lies. It
limits itself, runs the program as a module of its own, and only then asks for the tests and for the token
that goes with every verdict. Lines of JSON over the socket that it inherits as FD:

    <- {"program": text, "seconds": wall time, "memory_bytes": …}
    -> {"ready": true}                     the program has run
    <- {"token": text, "tests": [text, …]}
    -> {"token": text, "test": index}      for each test that passed, in their order

A test that is missing has failed. What this cannot prevent is said in docs/tasks.md.
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

#: A larger file cannot be written.
FILE_BYTES = 16 * 2**20
#: Open files at a time.
OPEN_FILES = 64
#: The user that owns nothing, by convention.
NOBODY = 65534

_PR_SET_NO_NEW_PRIVS = 38
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def limit(seconds: float, memory_bytes: int) -> None:
    """Bound this process for good: hard limits cannot be raised again."""
    if sys.platform == "linux":
        _drop_privileges()
    # The kernel's timer ends a sleeping program whose parent is gone; a busy one has its CPU time.
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    cpu_s = math.ceil(seconds)
    _set_limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
    _set_limit(resource.RLIMIT_AS, memory_bytes)
    _set_limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    _set_limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_NPROC, 0)  # no further process and, on Linux, no thread


def _set_limit(kind: int, soft: int, hard: int | None = None) -> None:
    # macOS has no limit on address space; a lower limit may be in force already.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (soft, soft if hard is None else hard))


def _drop_privileges() -> None:
    """Give up what root has beyond its files, and the network where the kernel allows that. Failures are borne."""
    libc = ctypes.CDLL(None)
    # RLIMIT_NPROC does not bind the real user 0. The effective user stays: Python's files may be its own.
    with contextlib.suppress(OSError):  # not root
        os.setresuid(NOBODY, -1, -1)
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Last: whoever makes a user namespace has every capability in it.
    header, nothing = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    libc.capset(header, nothing)


def main() -> None:
    """Run one program and its tests."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    lines = channel.makefile("r", encoding="ascii")
    request = json.loads(lines.readline())
    # The program may replace any of them, in builtins or in their modules.
    run, compiled, send, read, as_json, from_json = (
        *(exec, compile, channel.sendall, lines.readline),
        *(json.dumps, json.loads),
    )
    failure = BaseException
    limit(request["seconds"], request["memory_bytes"])
    # Not __main__: what a script does when it is run is not what is tested.
    module = sys.modules["program"] = types.ModuleType("program")
    run(compiled(request["program"], "program.py", "exec"), vars(module))
    send(b'{"ready": true}\n')
    verdict = from_json(read())
    for index, test in enumerate(verdict["tests"]):
        try:
            run(compiled(test, f"test {index}", "exec"), dict(vars(module)))
        except failure:  # whatever it raises, SystemExit too: it has not passed
            continue
        send(as_json({"token": verdict["token"], "test": index}).encode() + b"\n")


if __name__ == "__main__":
    main()
