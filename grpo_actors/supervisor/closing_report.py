"""The report that a run leaves behind: report.html, as ``grpo report`` writes it, if the extra `page` is installed.

A process of its own writes it. It starts with the last update, or when the user ends the run. During the last evaluation and
checkpoint it imports its libraries and draws once, which takes seconds; it reads the run again once the last record is written.
Whatever becomes of it, the run's result stays what it is.
"""

import contextlib
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from grpo_actors.config import Config
from grpo_actors.observe.records import Record
from grpo_actors.observe.view import number
from grpo_actors.page.extra import missing_packages
from grpo_actors.rundir.folder import REPORT_FILE

#: Longest time that the end of a run waits for its report, in seconds. If it was prepared by then, it takes a tenth of one.
PATIENCE_S = 20.0


class ClosingReport:
    """The process that writes the report of one run, from the end of its training on."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._run_dir = run_dir
        self._wanted = config.metrics.write_report and config.metrics.log_jsonl and not missing_packages()
        self._process: subprocess.Popen[str] | None = None

    def handle_record(self, record: Record) -> None:
        """Prepare the report if the training is over with this record."""
        done, planned = number(record, "update"), number(record, "total_updates")
        is_last = (
            record["topic"] == "metrics" and done is not None and planned is not None and done >= planned
        )
        if is_last or record["topic"] == "stop":
            self.prepare()

    def prepare(self) -> None:
        """Start the process, which then waits; may be called twice."""
        if not self._wanted or self._process is not None:
            return
        # It writes when its standard input ends: at `write`, or with this process.
        command = [sys.executable, "-m", "grpo_actors.report", "--when-told", str(self._run_dir)]
        with contextlib.suppress(OSError):  # no memory, or no process, left
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the run
            )

    def write(self) -> str | None:
        """Let the process write; return a line on what became of the report, None if there is to be none."""
        if self._process is None:
            return None
        try:
            _, errors = self._process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            return f"no report: it took more than {PATIENCE_S:.0f} s"
        except KeyboardInterrupt:
            return "no report: interrupted"
        if self._process.returncode == 0:
            return f"report: {self._run_dir / REPORT_FILE}"
        return f"no report: {(errors.splitlines() or ['its process was killed'])[-1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """End the process if it still runs."""
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes its pipes and waits
                pass
