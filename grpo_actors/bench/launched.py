"""A real run under the bench's eyes: launch.py as a user starts it, and the records that it writes. Loads no MLX."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from grpo_actors.config import Config
from grpo_actors.config.load import SHIPPED_CONFIGS
from grpo_actors.errors import RunError
from grpo_actors.observe.records import Record, decode
from grpo_actors.rundir.folder import METRICS_FILE

#: The program; beside the package, as the shipped configurations are.
LAUNCH = SHIPPED_CONFIGS.parent / "launch.py"
#: Between two looks at the records. Their own times are what counts.
POLL_S = 0.02


class Launched:
    """One run in a folder of its own; ended when the block is left."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Start it. Its output goes to a file, so that a progress display costs nothing."""
        if not LAUNCH.is_file():
            raise RunError(
                f"{LAUNCH}: not found; this part needs a clone of the project, not only the package"
            )
        self.run_dir = folder / "run"
        run = config.run.model_copy(update={"output_dir": str(self.run_dir)})
        saved = folder / "config.json"
        saved.write_text(config.model_copy(update={"run": run}).model_dump_json())
        self._said = folder / "said.txt"
        #: Unix seconds, as records have them.
        self.started_at = time.time()
        with self._said.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(LAUNCH), "--config", str(saved)],
                cwd=folder,
                env=with_this_package(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def records(self, topic: str) -> list[Record]:
        """Those told so far, in order."""
        path = self.run_dir / METRICS_FILE
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        told = [decode(line) for line in lines if line.endswith(b"\n")]
        return [record for record in told if record["topic"] == topic]

    def wait_for(self, topic: str, wanted: Callable[[Record], Any] = bool) -> Record:
        """The first such record, once it is there.

        Raises:
            RunError: the run has ended without it.
        """
        while True:
            ended = self._process.poll() is not None
            for record in self.records(topic):
                if wanted(record):
                    return record
            if ended:
                raise RunError(f"launch.py ended early: {self._last_words()}")
            time.sleep(POLL_S)

    def wait(self) -> None:
        """Until it has done all its updates. `RunError`: it failed."""
        if self._process.wait():
            raise RunError(f"launch.py failed: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self._said.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ask it to stop, if it has not; it writes a checkpoint first."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self._process.wait()


def with_this_package() -> dict[str, str]:
    """The environment of a process that shall find this package, whatever its working folder is."""
    paths = [str(SHIPPED_CONFIGS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
