"""The reward ``code_tests``: the share of a problem's tests that the Python program of a completion passes.

It runs programs that a model wrote. Each program gets its own process (`code_program`) with limits, an empty folder,
an empty environment and no open file, and is killed when its time is over. That protects the run from accidents. It
does not protect against a malicious program: docs/howto/code-tests.md says what is missing.
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

from grpo_actors import host
from grpo_actors.errors import RewardError
from grpo_actors.tasks.answers import extract_answer
from grpo_actors.tasks.rewards import Chat, text

#: The reward's name in a configuration.
CODE_TESTS = "code_tests"

#: Column of the data with the tests of a problem: one text or a list of texts.
TESTS_COLUMN = "tests"

_PROGRAM = Path(__file__).with_name("code_program.py")
# A fence with its language, and its content. Linear: only the last opening fence can lack a closing one.
_FENCE = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")

#: Most bytes read from a child in total, so that a program that floods the channel is not read any further.
MAX_REPLY_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class CodeLimits:
    """The resources that each program may use."""

    #: Wall time, and CPU time rounded up to whole seconds, for loading the program and for all its tests.
    seconds: float
    #: Address space.
    memory_bytes: int


class CodeTests:
    """The reward, with its limits. The programs of a group run in parallel, one on each core."""

    def __init__(self, limits: CodeLimits) -> None:
        self._limits = limits

    def __call__(
        self, prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Return for each completion the share of tests that do not raise; 0 if there is no program.

        Raises RewardError if the problem has no tests.
        """
        del prompts, answer
        given = columns.get(TESTS_COLUMN) or [None]
        tests = _tests(given[0])
        with ThreadPoolExecutor(
            host.cores()
        ) as pool:  # with more programs than cores, waiting ones would time out
            written = [program_of(text(completion)) for completion in completions]
            return list(pool.map(lambda program: passed_share(program, tests, self._limits), written))


def program_of(written: str) -> str:
    """Return the last fenced block of Python, from the answer if there is one; without a fence, the answer itself."""
    answer = extract_answer(written)
    fenced = _FENCE.findall(answer or written)
    blocks = [block for language, block in fenced if language.strip().lower() in _PYTHON]
    return blocks[-1] if blocks else answer


def passed_share(program: str, tests: Sequence[str], limits: CodeLimits) -> float:
    """Run one program and its tests within the limits; return the share of tests that passed."""
    if not program.strip():
        return 0.0
    ours, theirs = socket.socketpair()
    with _folder() as folder, ours:
        with theirs:
            child = _start(theirs, folder)
        try:
            passed = _run_tests(_Channel(ours, limits.seconds), program, tests, limits)
        finally:
            # Kill the whole process group before its folder is removed. macOS raises PermissionError for a zombie.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return len(passed) / len(tests)


@contextmanager
def _folder() -> Iterator[str]:
    """Provide an empty folder, and remove it afterwards with its content."""
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
            # Linear algebra libraries would start threads, which are not allowed.
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
    except OSError as error:
        raise RewardError(f"a process could not be started: {error}") from error


def _run_tests(channel: "_Channel", program: str, tests: Sequence[str], limits: CodeLimits) -> set[int]:
    """Send the program, then the tests; return the tests reported, with the token, as passed."""
    passed: set[int] = set()
    token = secrets.token_hex(16)
    with suppress(OSError, EOFError):  # it is gone or its time is over: the reports so far count
        channel.send({"program": program, "seconds": limits.seconds, "memory_bytes": limits.memory_bytes})
        while channel.receive() != {"ready": True}:
            pass
        channel.send({"token": token, "tests": list(tests)})
        while True:
            report = channel.receive()
            if report.get("token") == token and report.get("test") in range(len(tests)):
                passed.add(report["test"])
    return passed


class _Channel:
    """Lines of JSON to and from a process that may write anything, until `seconds` from now."""

    def __init__(self, channel: socket.socket, seconds: float) -> None:
        self._channel = channel
        self._deadline_s = time.monotonic() + seconds
        self._read = b""
        self._left_bytes = MAX_REPLY_BYTES

    def send(self, message: dict[str, Any]) -> None:
        """Send one line. Raises TimeoutError or OSError."""
        self._channel.settimeout(max(self._deadline_s - time.monotonic(), 0.01))
        self._channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Return the next line; empty if it is not a JSON object. Raises TimeoutError, OSError or EOFError."""
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
            message = json.loads(line)
        except (ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}
