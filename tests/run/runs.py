"""Real runs: launch.py as a user starts it, its records as a user reads them, its processes as ps lists them.

Every wait is for a condition, with a deadline that only a defect reaches.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from bounds import HANG_S

from grpo_actors.failpoints import FAILPOINTS

ROOT = Path(__file__).parents[2]

#: Over smoke_test.toml: six updates of two groups of four. An update takes a quarter of a second.
SETTINGS = {
    "max_new_tokens": 16,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "batch_groups": 1,
    "max_updates": 6,
    "save_steps": 2,
    "eval_every_updates": 3,
    "eval_subset_size": 4,
    "eval_batch_size": 4,
}


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = HANG_S) -> Any:
    """Wait until the condition is true; return its value."""
    end_s = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end_s, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.01)
    return value


class Attached(subprocess.Popen[bytes]):
    """A process started next to launch.py, with its standard error."""

    stderr_path: Path

    def stderr_text(self) -> str:
        return self.stderr_path.read_text()


class Run:
    """A run folder, and all processes started on it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder / "run"
        self.temporary = folder / "t"
        self.temporary.mkdir()
        # MLX compiles CPU kernels into the temporary folder, seconds each: shared by all runs.
        kernels = Path(tempfile.gettempdir()) / "mlx"
        kernels.mkdir(exist_ok=True)
        (self.temporary / "mlx").symlink_to(kernels)
        self.settings = {**SETTINGS, "output_dir": str(self.folder), **settings}
        self.failpoints = folder / "failpoints"
        self.failpoints.mkdir()
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TMPDIR": str(self.temporary),
            FAILPOINTS: str(self.failpoints),
        }
        #: 0: a process group of its own for each process; None: that of the tests.
        self.process_group: int | None = None
        self.launched: subprocess.Popen[bytes] | None = None
        self._stderr = folder / "stderr.txt"
        self._started: list[subprocess.Popen[bytes]] = []
        self._records: list[dict[str, Any]] = []
        #: Bytes of metrics.jsonl that `_records` holds.
        self._read_bytes = 0

    def said_after_start(self) -> list[str]:
        """The lines on standard error without those of every start: the folder, two commands, what the run waits for."""
        return [line for line in self.stderr.splitlines()[3:] if line and not re.match(r"\[\d+:\d+\] ", line)]

    # --- starting ---------------------------------------------------------------------------------

    def start(self, *arguments: str) -> "Run":
        self._records, self._read_bytes = [], 0
        self.launched = self._spawn(
            [str(ROOT / "launch.py"), *self.launch_arguments(*arguments)], self._stderr
        )
        return self

    def launch_arguments(self, *arguments: str) -> list[str]:
        settings = [f"--set={key}={json.dumps(value)}" for key, value in self.settings.items()]
        return ["--config", "smoke_test.toml", *settings, *arguments]

    def attach(self, *arguments: str, within: Sequence[str] = ()) -> Attached:
        return self.command("rollout", *arguments, within=within)

    def command(self, name: str, *arguments: str, within: Sequence[str] = ()) -> Attached:
        """Start one of the package's commands next to launch.py; `within`: a command that runs it, such as `nice`."""
        return self._spawn(["-m", f"grpo_actors.{name}", *arguments], within=within)

    def tail(self) -> Attached:
        """Start a reader of the run's records, which prints them as JSON."""
        return self.command("tail", str(self.folder), "--json")

    def _spawn(
        self,
        command: Sequence[str],
        stderr: Path | None = None,
        within: Sequence[str] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> Attached:
        path = stderr or self._stderr.with_suffix(f".{len(self._started)}")
        with path.open("wb") as file:
            process = Attached(
                [*within, sys.executable, *command],
                cwd=self.folder.parent,
                env=self.environment,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=file,
                process_group=self.process_group,
            )
        process.stderr_path = path
        self._started.append(process)
        return process

    def end(self, deadline_s: float = HANG_S) -> int:
        """Wait for launch.py; return its exit code."""
        assert self.launched is not None
        try:
            return self.launched.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {deadline_s:.0f} s: {self.stderr}")

    def run(self, *arguments: str) -> int:
        return self.start(*arguments).end()

    def kill_all(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    # --- failing ----------------------------------------------------------------------------------

    def arm(self, failpoint: str, action: str) -> None:
        """Make the first process that passes this failpoint from now on fail there (see `grpo_actors.failpoints`)."""
        draft = self.failpoints / "draft"
        draft.write_text(action)
        draft.rename(self.failpoints / failpoint)

    def wait_for_failure(self, failpoint: str) -> int:
        """Wait until an armed failpoint has fired; return the process that it fired in."""
        fired = wait_until(
            lambda: next(self.failpoints.glob(f"{failpoint}.*"), None), f"{failpoint}: {self.stderr}"
        )
        fired.unlink()
        return int(fired.suffix[1:])

    # --- looking ----------------------------------------------------------------------------------

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def records(self, topic: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Return the records written so far, in order; a line that is still being written is left out."""
        self._read_records()
        return [
            record
            for record in self._records
            if topic in (None, record["topic"]) and all(record.get(k) == v for k, v in fields.items())
        ]

    def _read_records(self) -> None:
        """Read what was written since the last call: a wait asks often, and a long run has many records."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            # A continued run cuts the file to the records of its checkpoint.
            file.seek(max(0, self._read_bytes - 1))
            if self._read_bytes and file.read(1) != b"\n":
                self._records, self._read_bytes = [], 0
                file.seek(0)
            whole = file.read().rpartition(b"\n")[0]
        new = [json.loads(line) for line in whole.splitlines()]
        if new and self._records and new[0]["seq"] != self._records[-1]["seq"] + 1:
            self._records, self._read_bytes = [], 0
            self._read_records()
        elif new:
            self._records += new
            self._read_bytes += len(whole) + 1

    def wait_for(self, topic: str, **fields: Any) -> dict[str, Any]:
        """Wait for a record with these fields; return the first."""

        def found() -> list[dict[str, Any]]:
            assert self.launched is not None
            assert self.launched.poll() is None or self.records(topic, **fields), self.stderr
            return self.records(topic, **fields)

        return wait_until(found, f"{topic} {fields}")[0]

    def updates(self) -> int:
        return max((record["update"] for record in self.records("metrics")), default=0)

    def wait_for_update(self, update: int) -> None:
        wait_until(lambda: self.updates() >= update or self._ended(), f"update {update}: {self.stderr}")
        assert self.updates() >= update, self.stderr

    def _ended(self) -> bool:
        return self.launched is not None and self.launched.poll() is not None

    def ledger(self) -> list[list[Any]]:
        """Return [lease, epoch, problem, worker] of every consumed group, in order."""
        return [entry for record in self.records("metrics") for entry in record["ledger"]]

    def curve(self) -> list[tuple[str, ...]]:
        """Return loss, reward and gradient norm of each update, to the last bit, and the digest of its weights."""
        digests = {r["version"]: r["digest"] for r in self.records("policy")}
        return [
            (*(float(r[key]).hex() for key in ("loss", "reward_mean", "grad_norm")), digests[r["update"]])
            for r in self.records("metrics")
        ]

    def tensors(self, update: int, name: str) -> dict[str, tuple[str, bytes]]:
        """Return {name: (type and shape, bytes)} of a checkpoint's file; their order in the file does not matter."""
        data = (self.folder / f"checkpoint-{update}" / name).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {
            tensor: (f"{entry['dtype']}{entry['shape']}", data[start + first : start + last])
            for tensor, entry in header.items()
            for first, last in [entry["data_offsets"]]
        }

    def checkpoints(self) -> list[int]:
        return sorted(int(p.name[11:]) for p in self.folder.glob("checkpoint-*") if p.name[11:].isdigit())

    def child(self, name: str) -> int:
        """Return the process id of the learner, the evaluator, or a worker by its name."""
        assert self.launched is not None
        tokens = ["grpo_actors.rollout", name] if name.startswith("rollout") else [f"grpo_actors.{name}"]
        return wait_until(
            lambda: next(
                (pid for pid, c in children(self.launched.pid) if all(t in c for t in tokens)), None
            ),
            f"a child {name}",
        )

    def signal(self, number: int) -> None:
        assert self.launched is not None
        self.launched.send_signal(number)

    # --- checks -----------------------------------------------------------------------------------

    def assert_no_gap_in_records(self) -> None:
        numbers = [record["seq"] for record in self.records()]
        assert numbers == list(range(1, len(numbers) + 1))
        updates = [record["update"] for record in self.records("metrics")]
        assert updates == list(range(1, len(updates) + 1))

    def assert_nothing_left(self) -> None:
        """Assert that a finished run has left no process, no socket file or folder, and no address."""
        assert [command for _, command in processes() if str(self.folder) in command] == []
        assert [path.name for path in self.temporary.iterdir()] == ["mlx"]
        assert not (self.folder / "endpoints.json").exists()
        assert list(self.folder.glob("*.tmp")) == []


def processes() -> list[tuple[int, list[str]]]:
    """Return process id and command line of every process on this host."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,stat=,command="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listing.stdout.splitlines()]
    return [(int(pid), command) for pid, state, *command in rows if not state.startswith("Z")]


def children(parent: int) -> list[tuple[int, list[str]]]:
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,command="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listing.stdout.splitlines()]
    return [
        (int(pid), command)
        for pid, ppid, state, *command in rows
        if int(ppid) == parent and not state.startswith("Z")
    ]


def living(pids: Iterable[int]) -> set[int]:
    """Return those of the processes that still run."""
    return set(pids) & {pid for pid, _ in processes()}


def kill(pid: int, number: int = signal.SIGKILL) -> float:
    """Send a signal; return the wall-clock time at which it was sent, comparable with that of a record."""
    os.kill(pid, number)
    return time.time()


R = TypeVar("R", bound=Run)


@contextlib.contextmanager
def new_run(kind: type[R] = Run, **settings: Any) -> Iterator[R]:
    # Not tmp_path: an ipc path may have 103 characters on macOS.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as name:
        run = kind(Path(name), **settings)
        try:
            yield run
        finally:
            run.kill_all()
