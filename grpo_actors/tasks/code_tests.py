"""The reward ``code_tests``: the share of a problem's tests that the Python program of a completion passes.

It runs what a model wrote. Each program gets a process of its own (`code_program`) with limits, an empty
folder, an empty environment and no open file, and is killed when its time is over. That keeps
accidents from the run. It is no wall against a program that means harm: docs/tasks.md says what is missing.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from grpo_actors.errors import RewardError
from grpo_actors.tasks.answers import extract_answer
from grpo_actors.tasks.rewards import Chat, text

#: The reward's name in a configuration.
CODE_TESTS = "code_tests"

#: The column of the data with a problem's tests: one text, or a list of them.
TESTS_COLUMN = "tests"

_PROGRAM = Path(__file__).with_name("code_program.py")
# A fence with its language, and what it holds. Linear: only the last opening fence can lack a closing one.
_FENCE = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")

#: What a child may say in all: a program that floods the channel is not read for longer.
MAX_REPLY_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class CodeLimits:
    """What each program may use."""

    #: Wall time, and CPU time rounded up to whole seconds; for loading the program and all of its tests.
    seconds: float
    #: Address space.
    memory_bytes: int


class CodeTests:
    """The reward, with its limits. The programs of a group run side by side, one for each core."""

    def __init__(self, limits: CodeLimits) -> None:
        self._limits = limits

    def __call__(
        self, prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """For each completion the share of its tests that raise nothing; 0 where there is no program.

        Raises RewardError where the problem has no tests.
        """
        del prompts, answer
        given = columns.get(TESTS_COLUMN) or [None]
        tests = _tests(given[0])
        with ThreadPoolExecutor(_cores()) as pool:
            written = [program_of(text(completion)) for completion in completions]
            return list(pool.map(lambda program: passed_share(program, tests, self._limits), written))


def _cores() -> int:
    """Those of this process: programs that wait for one run into their time limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def program_of(written: str) -> str:
    """The last fenced block of Python, in the answer if there is one; without a fence, the answer itself."""
    answer = extract_answer(written)
    fenced = _FENCE.findall(answer or written)
    blocks = [block for language, block in fenced if language.strip().lower() in _PYTHON]
    return blocks[-1] if blocks else answer


def passed_share(program: str, tests: Sequence[str], limits: CodeLimits) -> float:
    """Run one program against its tests, within the limits."""
    if not program.strip():
        return 0.0
    ours, theirs = socket.socketpair()
    with _folder() as folder, ours:
        with theirs:
            child = _start(theirs, folder)
        try:
            passed = _converse(_Channel(ours, limits.seconds), program, tests, limits)
        finally:
            # The whole group, before its folder is removed. macOS answers PermissionError for a zombie's.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return len(passed) / len(tests)


@contextmanager
def _folder() -> Iterator[str]:
    """An empty folder, removed afterwards with what is in it."""
    folder = mkdtemp(prefix="code_tests_")
    try:
        yield folder
    finally:
        # A program may nest folders deeper than shutil.rmtree can follow.
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)


def _tests(given: object) -> list[str]:
    tests = [given] if isinstance(given, str) else given
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise RewardError(
            f"needs the column {TESTS_COLUMN!r}, a text of Python or a list of such texts, "
            f"got {type(given).__name__}; add it to the problem"
        )
    return tests


def _start(channel: socket.socket, folder: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), str(channel.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[channel.fileno()],
            cwd=folder,
            # Libraries of linear algebra would start threads, which are not allowed.
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
    except OSError as error:
        raise RewardError(f"a process could not be started: {error}") from error


def _converse(channel: "_Channel", program: str, tests: Sequence[str], limits: CodeLimits) -> set[int]:
    """Hand over the program, then the tests; returns the tests that are said, with the token, to have passed."""
    passed: set[int] = set()
    token = secrets.token_hex(16)
    with suppress(OSError, EOFError):  # it is gone, or its time is over: what was said until then counts
        channel.send({"program": program, "seconds": limits.seconds, "memory_bytes": limits.memory_bytes})
        while channel.receive() != {"ready": True}:
            pass
        channel.send({"token": token, "tests": list(tests)})
        while True:
            said = channel.receive()
            if said.get("token") == token and said.get("test") in range(len(tests)):
                passed.add(said["test"])
    return passed


class _Channel:
    """Lines of JSON to and from a process that may write anything, for so many seconds."""

    def __init__(self, channel: socket.socket, seconds: float) -> None:
        self._channel = channel
        self._deadline_s = time.monotonic() + seconds
        self._read = b""
        self._left_bytes = MAX_REPLY_BYTES

    def send(self, message: dict[str, Any]) -> None:
        """One line. Raises TimeoutError or OSError."""
        self._channel.settimeout(max(self._deadline_s - time.monotonic(), 0.01))
        self._channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next line, empty where it is no JSON object. Raises TimeoutError, OSError or EOFError."""
        while b"\n" not in self._read:
            remaining_s = self._deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError
            self._channel.settimeout(remaining_s)
            part = self._channel.recv(2**16)
            self._left_bytes -= len(part)
            if not part or self._left_bytes < 0:
                raise EOFError
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return {}
        return said if isinstance(said, dict) else {}
