"""The cores and the memory of this host that a process may use, within the limits of its container. Loads no MLX."""

import math
import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
#: Where a container sees its own limits (cgroup v2).
_CGROUP = Path("/sys/fs/cgroup")


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
