"""Memory, open files and threads of a run's processes, read from /proc while it runs. Linux only."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from runs import Run, children

#: A process has loaded its model, and has the largest of its arrays, after so many seconds.
WARM_S = 60.0


class Sample(NamedTuple):
    role: str
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
        for role, pid in roles(run).items():
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                )
                self.samples.append(
                    Sample(
                        role.rstrip("-0123456789"),
                        pid,
                        at_s,
                        int(status["VmRSS"].split()[0]) / 1024,
                        len(list(Path(f"/proc/{pid}/fd").iterdir())),
                        int(status["Threads"]),
                    )
                )

    @property
    def roles(self) -> list[str]:
        return sorted({sample.role for sample in self.samples})

    def lifetimes(self, role: str) -> list[list[Sample]]:
        """The samples of each process of a role, without those of its first minute."""
        by_pid: dict[int, list[Sample]] = {}
        for sample in self.samples:
            if sample.role == role:
                by_pid.setdefault(sample.pid, []).append(sample)
        warm = ([s for s in life if s.at_s > life[0].at_s + WARM_S] for life in by_pid.values())
        return [life for life in warm if len(life) > 1]

    def largest(self, role: str) -> Sample:
        """The maxima of a role's processes, each on its own."""
        own = [sample for sample in self.samples if sample.role == role]
        return own[0]._replace(
            memory_mb=max(s.memory_mb for s in own),
            files=max(s.files for s in own),
            threads=max(s.threads for s in own),
        )

    def growth_per_hour(self, role: str, field: str) -> float:
        """Slope of a figure within the lives of a role's processes: one slope for all, a level for each; NaN: too short."""
        products = squares = 0.0
        for life in self.lifetimes(role):
            times_h = [sample.at_s / 3600 for sample in life]
            values = [float(getattr(sample, field)) for sample in life]
            mean_h, mean = _mean(times_h), _mean(values)
            products += sum((t - mean_h) * (v - mean) for t, v in zip(times_h, values, strict=True))
            squares += sum((t - mean_h) ** 2 for t in times_h)
        return products / squares if squares else float("nan")


def roles(run: Run) -> dict[str, int]:
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


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
