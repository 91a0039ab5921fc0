"""The memory that the process of the tests has."""

import os
from pathlib import Path


def resident_mib() -> float:
    """Return its resident memory in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
