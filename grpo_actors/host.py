"""The cores and the memory of this host that a process may use, within the limits of its container. Loads no MLX."""

import ctypes
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
#: Where a container sees its own limits (cgroup v2).
_CGROUP = Path("/sys/fs/cgroup")

#: Shortest time between two returns of freed memory: each takes some 5 ms, and as long again until the pages are back.
RETURN_EVERY_S = 60.0


def cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores may work for this process at a time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        # Microseconds of all cores together that the container may take in each period.
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
    except (OSError, ValueError):  # as for memory, below
        return allowed
    return min(allowed, math.ceil(quota / period))


def memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of memory that this host has, or the container may take if that is less."""
    of_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(of_host, int((cgroup / "memory.max").read_text()))
    except (OSError, ValueError):
        return of_host


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Return the bytes that fit into memory without swapping, and within the container's limit; 0 if Linux does not tell.

    Beyond a container's limit no allocation fails: the kernel kills one of its processes.
    """
    available = _numbers(meminfo).get("MemAvailable:", 0) * 1024
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # not in a container, or one without a limit ("max")
        return available
    stat = _numbers(cgroup / "memory.stat")
    # Counted as used, and given up on demand.
    cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)
    return max(0, min(available, limit - used + cached))


def _numbers(path: Path) -> dict[str, int]:
    """Read lines of a name and a number, and perhaps a unit; no lines if there is no such file."""
    if not path.is_file():
        return {}
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}


@dataclass
class Heap:
    """The heap of the C library, which keeps freed pieces for the next arrays.

    glibc's grows with arrays of many sizes: in a worker of the embedded model from 120 to 160 MB within 2,500 updates, of which
    120 MB were left after they were returned.
    """

    returned_s: float = -math.inf

    def return_freed(self) -> None:
        """Return what is free to the system, at most once in `RETURN_EVERY_S`; do nothing with another C library."""
        now_s = time.monotonic()
        if now_s - self.returned_s < RETURN_EVERY_S:
            return
        self.returned_s = now_s
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
