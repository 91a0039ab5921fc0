"""CUDA MPS for the processes of a run: NVIDIA's service that lets them compute on one GPU at the same time.

Without it they take turns. The supervisor starts MPS for its own children where it helps (several processes on a GPU), is
wanted (``run.cuda_mps``) and is not there yet, from the user or the system. One MPS serves all GPUs; a process that has
a GPU for itself does without. A keeper process (`mps_keeper`) runs it and ends it with the run. If it does not come up,
the run goes on without it.
"""

import contextlib
import errno
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from grpo_actors.backend import MPS_FOLDER
from grpo_actors.config import Config
from grpo_actors.supervisor.mps_keeper import CONTROL, END_S, START_S
from grpo_actors.supervisor.placement import Placement

#: Where CUDA looks for MPS if no folder is set.
DEFAULT_FOLDER = Path("/tmp/nvidia-mps")  # noqa: S108 - NVIDIA's choice
#: Seconds between two looks at the keeper, and whether the user has pressed Ctrl-C.
TICK_S = 0.05


def mps_helps(config: Config, placement: Placement) -> bool:
    """Return whether this run should start MPS: it is wanted, processes share a GPU, and none is there."""
    places = {device for _, _, device in placement.actors() if device.back_end == "cuda"}
    return config.run.cuda_mps and any(map(placement.is_shared, places)) and not is_provided()


def is_provided(default: Path = DEFAULT_FOLDER) -> bool:
    """Return whether the user or the system provides MPS: a folder is set, or a daemon answers in the default one."""
    if MPS_FOLDER in os.environ:
        return True
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.connect(os.fspath(default / "control"))
    except OSError as error:
        return error.errno == errno.EPROTOTYPE  # somebody listens, on a socket of another type
    return True


def mps_environment(folder: str) -> dict[str, str]:
    """Return the variables with which a child uses the MPS of `folder`; none if it is empty."""
    return {MPS_FOLDER: folder} if folder else {}


class Mps:
    """MPS of one run, from the start of the context to its end; does nothing unless `starts`."""

    def __init__(self, *, starts: bool) -> None:
        self._starts = starts
        #: Why the run has no MPS; empty while it has, or may get one.
        self.reason = ""
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._starts and shutil.which(CONTROL) is None:
            self.reason = f"{CONTROL} is not on PATH"
        elif self._starts:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "grpo_actors.supervisor.mps_keeper"],
                # No other process inherits the write end of this pipe: it closes when this process ends, and MPS with it.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C reaches the supervisor only
            )
        return self

    def folder(self, gives_up: Callable[[], object]) -> str:
        """Wait until clients can connect; return their folder, or an empty text; `reason` then says why.

        Args:
            gives_up: Called again and again; if it returns something true, the wait ends without a folder or reason.
        """
        if self._keeper is None or self._keeper.stdout is None:
            return ""
        end_s = time.monotonic() + START_S + END_S
        while not select.select([self._keeper.stdout], [], [], TICK_S)[0]:
            if gives_up():
                return ""
            if time.monotonic() > end_s:
                self.reason = "its keeper does not answer"
                return ""
        state, _, text = self._keeper.stdout.readline().decode(errors="replace").strip().partition(" ")
        if state == "up":
            return text
        self.reason = text or "its keeper crashed"
        return ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(END_S)
        except subprocess.TimeoutExpired:
            self._keeper.terminate()  # it ends the daemon first
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(END_S)
            self._keeper.kill()
            self._keeper.wait()
        self._keeper.stdout.close()
