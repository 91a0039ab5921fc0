"""Start a real run with ``grpo train``, as a user does, and read its records. Loads no MLX."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from grpo_actors.bench.workload import EQUAL
from grpo_actors.config import Config
from grpo_actors.errors import RunError
from grpo_actors.observe.records import Record, decode
from grpo_actors.rundir.folder import METRICS_FILE

#: ``grpo train``, as Python's arguments.
TRAIN = ("-m", "grpo_actors", "train")
#: Seconds between two reads of the records; figures use the times in the records, not this interval.
POLL_S = 0.02


#: Nats that no difference between two log-probs reaches.
UNBOUNDED = 1e6


class Launched:
    """One run in its own folder; leaving the block stops it."""

    def __init__(
        self, config: Config, folder: Path, *, working_folder: Path | None = None, lengths: str = EQUAL
    ) -> None:
        """Start the run. Its output goes to a file, so that a progress display costs nothing.

        Args:
            config: The settings; the run's folder is ``run`` in `folder`, whatever they say.
            folder: A folder of this run only.
            working_folder: Where relative paths in the settings begin; None: `folder`.
            lengths: Distribution of the lengths of the workers' completions; `EQUAL`: they end as the model samples.
        """
        self.run_dir = folder / "run"
        run = config.run.model_copy(update={"output_dir": str(self.run_dir)})
        saved = folder / "config.json"
        command = [*TRAIN, str(saved)]
        if lengths != EQUAL:
            command = ["-m", "grpo_actors.bench.planned_run", str(saved), lengths]
            # A planned end is no likely one: its log-prob is not to look like a defect of the worker.
            unbounded = dict.fromkeys(("max_logprob_gap", "max_mismatch_kl"), UNBOUNDED)
            health = config.health.model_copy(update=unbounded)
            config = config.model_copy(update={"health": health})
        saved.write_text(config.model_copy(update={"run": run}).model_dump_json())
        self.output = folder / "output.txt"
        #: Unix seconds, as in records.
        self.started_at = time.time()
        with self.output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=working_folder or folder,
                env=with_this_package(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches only the bench, which passes it on: a second one would end the run without a checkpoint.
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._process.pid

    def send(self, number: int) -> None:
        """Send the supervisor a signal, if it still runs."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait until the supervisor has ended; return its exit code."""
        return self._process.wait()

    def records(self, topic: str | None = None) -> list[Record]:
        """Return all records of a topic (None: of all) that the run has written so far, in order."""
        written = _RecordFile(self.run_dir / METRICS_FILE).new()
        return [record for record in written if topic in (None, record["topic"])]

    def first(self, topic: str, wanted: Callable[[Record], Any] = bool) -> Record | None:
        """Wait for the first record of a topic that `wanted` accepts; return None if the run has ended without one."""
        file = _RecordFile(self.run_dir / METRICS_FILE)
        while True:
            ended = self._process.poll() is not None
            for record in file.new():
                if record["topic"] == topic and wanted(record):
                    return record
            if ended:
                return None
            time.sleep(POLL_S)

    def wait_for(self, topic: str, wanted: Callable[[Record], Any] = bool) -> Record:
        """Do as `first`, but raise `RunError` if the run has ended without such a record."""
        record = self.first(topic, wanted)
        if record is None:
            raise RunError(f"the run ended early: {self._last_line()}")
        return record

    def wait(self) -> None:
        """Wait until the run has done all its updates; raises RunError if it failed."""
        if self.end():
            raise RunError(f"the run failed: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self.output.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it printed nothing")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the run if it still runs; it writes a checkpoint first."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self._process.wait()


class _RecordFile:
    """A run's file of records, of which only what is new is read: to read all of it often would cost the run a core."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0

    def new(self) -> list[Record]:
        """Return the records that were written since the last call; all, if a learner that started again cut some off."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read_bytes:
                self._read_bytes = 0
            file.seek(self._read_bytes)
            whole, line_break, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole + line_break)
        return [decode(line) for line in whole.splitlines()]


def with_this_package() -> dict[str, str]:
    """Return an environment in which a process finds this package from any working folder."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
