"""Memory, open files and threads of a run's processes, read from /proc while it runs. Linux only."""

import contextlib
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from runs import Run, children

#: A process has loaded its model, and has the largest of its arrays, after so many seconds.
WARM_S = 60.0


class Sample(NamedTuple):
    actor: str
    pid: int
    at_s: float
    memory_mb: float
    files: int
    threads: int


class Usage:
    """What the processes of a run use, sampled whenever `look` is called."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def look(self, run: Run) -> None:
        at_s = time.monotonic()
        for actor, pid in actors(run).items():
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                )
                self.samples.append(
                    Sample(
                        actor,
                        pid,
                        at_s,
                        int(status["VmRSS"].split()[0]) / 1024,
                        len(list(Path(f"/proc/{pid}/fd").iterdir())),
                        int(status["Threads"]),
                    )
                )

    @property
    def actors(self) -> list[str]:
        return sorted({sample.actor for sample in self.samples})

    def largest(self, actor: str) -> Sample:
        """The maxima of an actor's processes, each on its own."""
        own = [sample for sample in self.samples if sample.actor == actor]
        return own[0]._replace(
            memory_mb=max(s.memory_mb for s in own),
            files=max(s.files for s in own),
            threads=max(s.threads for s in own),
        )

    def longest_life(self, actor: str) -> list[Sample]:
        """The samples of the process of an actor that lived longest, without those of its first minute."""
        by_pid: dict[int, list[Sample]] = {}
        for sample in self.samples:
            if sample.actor == actor:
                by_pid.setdefault(sample.pid, []).append(sample)
        longest = max(by_pid.values(), key=lambda life: life[-1].at_s - life[0].at_s)
        return [sample for sample in longest if sample.at_s > longest[0].at_s + WARM_S]


class Slope(NamedTuple):
    """How a figure of one process grows, by least squares."""

    per_hour: float
    #: Standard error.
    error: float
    #: Seconds from the first sample to the last.
    over_s: float

    @classmethod
    def of(cls, life: list[Sample], field: str) -> "Slope | None":
        """Return the slope of a figure; None for fewer than three samples."""
        if len(life) < 3:
            return None
        hours = [(sample.at_s - life[0].at_s) / 3600 for sample in life]
        values = [float(getattr(sample, field)) for sample in life]
        slope, level = statistics.linear_regression(hours, values)
        spread = sum((hour - statistics.fmean(hours)) ** 2 for hour in hours)
        rest = sum((value - level - slope * hour) ** 2 for hour, value in zip(hours, values, strict=True))
        return cls(slope, math.sqrt(rest / (len(life) - 2) / spread), 3600 * hours[-1])

    def __str__(self) -> str:
        return f"{self.per_hour:+.1f} ± {self.error:.1f} per hour, over {self.over_s:.0f} s"


def actors(run: Run) -> dict[str, int]:
    """The supervisor and its living children by name."""
    assert run.launched is not None
    if run.launched.poll() is not None:
        return {}
    found = {"supervisor": run.launched.pid}
    for pid, command in children(run.launched.pid):
        modules = [word.rpartition(".")[2] for word in command if word.startswith("grpo_actors.")]
        if modules:  # the last: the supervisor's entry starts it
            found[command[command.index("--name") + 1] if "--name" in command else modules[-1]] = pid
    return found
