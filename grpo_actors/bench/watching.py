"""Watch the memory of a run's processes from outside, once a second: the GPU's by nvidia-smi, the host's by /proc or ps.

Needs nothing from the run itself. Loads no MLX, which would take GPU memory of its own.
"""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from grpo_actors.devices import nvidia_smi

#: Seconds between two samples.
PERIOD_S = 1.0
#: Seconds after which a listing is given up; the sample then lacks it.
LISTING_S = 10.0
#: The process in whose name a sample lists launch.py itself.
SUPERVISOR = "supervisor"
#: nvidia-smi prints MiB, ps prints KiB.
MIB, KIB = 2**20, 2**10
#: Where Linux lists its processes; a container may lack ps.
PROC = Path("/proc")
_PACKAGE = "grpo_actors."
#: The module that starts each actor; the actor's own module follows it on the command line.
_ENTRY = "grpo_actors.supervisor.entry"
_KEEPER = "grpo_actors.supervisor.mps_keeper"


class Process(NamedTuple):
    """A process of this machine."""

    pid: int
    parent: int
    rss_bytes: int
    command: Sequence[str]


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The memory in use at one moment, in bytes."""

    #: Unix seconds, as in records.
    time: float
    #: Of all GPUs that the run sees, by all programs; None without nvidia-smi.
    gpu: int | None
    #: Process -> its GPU memory; empty if nvidia-smi does not list processes, as in some containers.
    gpu_of: Mapping[str, int]
    #: Process of the run -> its resident memory, with that of its own children (rewards run in one).
    host_of: Mapping[str, int]


class Watch:
    """Samples the memory of a process and its descendants in a thread; leaving the block ends it."""

    def __init__(self, root: int) -> None:
        """Watch the process `root`, launch.py."""
        self.samples: list[MemorySample] = []
        self._root = root
        self._has_gpu = shutil.which("nvidia-smi") is not None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def _run(self) -> None:
        while not self._ended.is_set():
            self.samples.append(self._sample())
            self._ended.wait(PERIOD_S)

    def _sample(self) -> MemorySample:
        now, everything = time.time(), processes()
        names = names_of(everything, self._root)
        host: dict[str, int] = {}
        for process in everything:
            if process.pid in names:
                name = names[process.pid]
                host[name] = host.get(name, 0) + process.rss_bytes
        if not self._has_gpu:
            return MemorySample(now, None, {}, host)
        others = {process.pid: Path(process.command[0]).name for process in everything if process.command}
        used: dict[str, int] = {}
        for pid, mebibytes in _numbers(nvidia_smi("--query-compute-apps=pid,used_memory")):
            # A process that is not of the run is a stranger on the same GPU.
            name = names.get(pid) or others.get(pid, f"pid {pid}")
            used[name] = used.get(name, 0) + mebibytes * MIB
        whole = _numbers(nvidia_smi("--query-gpu=memory.used"))
        return MemorySample(now, sum(row[0] for row in whole) * MIB if whole else None, used, host)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def processes() -> list[Process]:
    """Return all processes of this machine; none if they cannot be listed."""
    if PROC.is_dir():
        return [found for folder in PROC.iterdir() if folder.name.isdigit() and (found := _read(folder))]
    rows = [line.split() for line in _lines(["ps", "-A", "-ww", "-o", "pid=,ppid=,rss=,command="])]
    return [Process(int(row[0]), int(row[1]), int(row[2]) * KIB, row[3:]) for row in rows if len(row) > 3]


def _read(folder: Path) -> Process | None:
    """Return the process of a folder of /proc; None if it has ended."""
    try:
        # The name in brackets may hold spaces and brackets; state and parent follow it.
        parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
        pages = (folder / "statm").read_text().split()[1]
        command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (OSError, IndexError):
        return None
    return Process(int(folder.name), int(parent), int(pages) * os.sysconf("SC_PAGE_SIZE"), command)


def names_of(everything: Sequence[Process], root: int) -> dict[int, str]:
    """Return process id -> name of the actor that it is or belongs to, for `root` and all its descendants."""
    children: dict[int, list[Process]] = {}
    for process in everything:
        children.setdefault(process.parent, []).append(process)
    names, waiting = {root: SUPERVISOR}, [root]
    while waiting:
        parent = waiting.pop()
        for child in children.get(parent, ()):
            names[child.pid] = (names[parent] == SUPERVISOR and _actor(child.command)) or names[parent]
            waiting.append(child.pid)
    return names


def _actor(command: Sequence[str]) -> str | None:
    """Return the name of the actor that a command line starts: learner, evaluator, or a worker's own name; also mps."""
    if _KEEPER in command:
        return "mps"
    if _ENTRY not in command[:-1]:
        return None
    module = command[command.index(_ENTRY) + 1]
    if "--name" in command[:-1]:
        return command[command.index("--name") + 1]
    return module.removeprefix(_PACKAGE)


def _numbers(rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the rows of whole numbers; a row with another cell, such as ``[N/A]``, is left out."""
    return [[int(cell) for cell in row] for row in rows if all(cell.isdigit() for cell in row)]


def _lines(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LISTING_S)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
