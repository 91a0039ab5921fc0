"""What a child has done so far, as the system counts it: whether one that cannot report does anything at all. Linux only."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Activity(NamedTuple):
    """Of all processes in a group, since their start."""

    computed_s: float
    #: Bytes that they have read and written, from and to files, pipes and disks. Not all sockets count.
    moved_bytes: int


def activity_of(group: int) -> Activity | None:
    """Return the activity of the processes in a group; None: this system does not tell, or there is none."""
    found = [activity for path in PROC.glob("[0-9]*") if (activity := _activity_in(path, group)) is not None]
    if not found:
        return None
    return Activity(sum(a.computed_s for a in found), sum(a.moved_bytes for a in found))


def _activity_in(process: Path, group: int) -> Activity | None:
    with contextlib.suppress(OSError):  # it has just ended, or belongs to somebody else
        # The name, in parentheses, may contain anything. What follows: state, parent, group; at 11 to 14 the ticks in
        # user and kernel mode, of the process and of its children that have ended.
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        if int(fields[2]) == group:
            ticks = sum(map(int, fields[11:15]))
            counts = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
            moved = sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
            return Activity(ticks / os.sysconf("SC_CLK_TCK"), moved)
    return None
