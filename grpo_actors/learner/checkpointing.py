"""Writing checkpoints while training goes on.

A frozen checkpoint holds the arrays of its moment, and training makes new ones: until the checkpoint is written, its
arrays exist twice. Where the memory has no room for that, the learner waits instead. The thread computes nothing.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from grpo_actors.policy.device import on_cuda
from grpo_actors.process import CHECKPOINT_ROOM
from grpo_actors.rundir.checkpoint_weights import FrozenCheckpoint
from grpo_actors.rundir.checkpoints import Checkpoint
from grpo_actors.rundir.staging import Staging, open_staging
from grpo_actors.rundir.tensor_files import Reader, read_in_place


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that is durable, and the seconds that it took."""

    checkpoint: Checkpoint
    seconds: float


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread of its own, one after the other."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staging: Staging | None = None
        #: Whether training goes on meanwhile; None before the first checkpoint.
        self._in_background: bool | None = None
        #: MLX's memory limit next to no checkpoint.
        self._limit = mx.get_memory_limit()

    def start(self, frozen: FrozenCheckpoint) -> Future[Written]:
        """Start to write a checkpoint; return when training may go on. The result is a `RunError` if it fails."""
        if self._in_background is None:
            # Decided once, when the peak is that of updates alone: later it includes a checkpoint.
            self._staging = open_staging()
            self._in_background = has_room(frozen.bytes) and (not on_cuda() or self._staging is not None)
        read = read_in_place if self._staging is None else self._staging.read
        if self._in_background:
            mx.set_memory_limit(self._limit + granted_room())
        written = self._thread.submit(self._write, frozen, read)
        if not self._in_background:
            wait([written])
        return written

    def close(self) -> None:
        """Finish the checkpoint under way; may be called twice."""
        self._thread.shutdown()
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _write(self, frozen: FrozenCheckpoint, read: Reader) -> Written:
        started_s = time.monotonic()
        try:
            return Written(frozen.write(self._run_dir, read), time.monotonic() - started_s)
        finally:
            mx.set_memory_limit(self._limit)


def granted_room() -> int:
    """Return the bytes beyond its limit that the supervisor's plan has for a checkpoint; 0 without a plan."""
    return int(os.environ.get(CHECKPOINT_ROOM, "0"))


def has_room(size: int) -> bool:
    """Return whether MLX may use `size` bytes more than it ever did, so that training goes on next to a checkpoint.

    The peak alone does not tell: on a GPU MLX computes ahead as far as its limit allows.
    """
    return size <= granted_room() or mx.get_peak_memory() + size <= mx.get_memory_limit()
