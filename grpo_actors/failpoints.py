"""Failpoints: named moments at which a test makes a process fail. Off unless GRPO_ACTORS_FAILPOINTS names a folder.

A file in that folder arms the failpoint of its name; its text says what happens there::

    echo kill > "$GRPO_ACTORS_FAILPOINTS/checkpoint.sealed"

The first process that passes ``reach("checkpoint.sealed")`` renames the file to ``checkpoint.sealed.PID`` and then fails.
So an armed failpoint fires once, also when the process is started again, and whoever armed it sees when it fired and where.
"""

import errno
import os
import signal
import time
from pathlib import Path

#: Environment variable: the folder.
FAILPOINTS = "GRPO_ACTORS_FAILPOINTS"

_FOLDER = os.environ.get(FAILPOINTS, "")


def reach(name: str) -> None:
    """Fail here if `name` is armed.

    ``kill`` ends this process as SIGKILL does, ``stop`` halts all its threads until SIGCONT, ``hang`` halts this thread
    for ever, and ``full`` raises the OSError of a full disk.
    """
    if not _FOLDER:
        return
    armed = Path(_FOLDER, name)
    try:
        action = armed.read_text().strip()
        armed.rename(armed.with_name(f"{name}.{os.getpid()}"))
    except FileNotFoundError:  # not armed, or another process was first
        return
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        return  # a stopped process continues here
    while action == "hang":
        time.sleep(1.0)
    raise ValueError(f"{armed}: must be kill, stop, hang or full, got {action!r}")
