"""Writing checkpoints while training goes on.

A frozen checkpoint holds the arrays of its moment, and training makes new ones. On a CPU and on Metal its arrays exist
twice until it is written. On CUDA they are copied to the host's memory first, and the device holds nothing. Where the
memory has no room for that, the learner waits for the checkpoint instead. The thread computes nothing.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from grpo_actors.policy.device import on_cuda
from grpo_actors.process import CHECKPOINT_ROOM
from grpo_actors.rundir import snapshot
from grpo_actors.rundir.checkpoint_weights import FrozenCheckpoint
from grpo_actors.rundir.checkpoints import Checkpoint, prune
from grpo_actors.rundir.tensor_files import fetched


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that is durable, and the seconds that it took."""

    checkpoint: Checkpoint
    seconds: float


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread of its own, one after the other."""

    def __init__(
        self, run_dir: Path, reserve: Callable[[int], snapshot.HostMemory | None] | None = None
    ) -> None:
        """`reserve` makes host memory of so many bytes to copy to; None: `snapshot.reserve` on CUDA, else nothing does."""
        self._run_dir = run_dir
        self._reserve = reserve or (snapshot.reserve if on_cuda() else None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host_memory: Future[snapshot.HostMemory | None] | None = None
        self._under_way: list[Future[Written]] = []
        #: Removals that were started and whose error, if any, has not been raised.
        self._removals: list[Future[None]] = []
        #: Whether training goes on beside arrays that are read in place; None before the first checkpoint.
        self._has_room: bool | None = None
        #: MLX's memory limit next to no checkpoint.
        self._limit = mx.get_memory_limit()

    @property
    def reserves_memory(self) -> bool:
        """Whether checkpoints pass through host memory that is reserved for them."""
        return self._reserve is not None

    def prepare(self, frozen: FrozenCheckpoint) -> None:
        """Start to reserve the host memory, if any, that checkpoints of this size need; only the first call counts."""
        if self._reserve is not None and self._host_memory is None:
            self._host_memory = self._thread.submit(self._reserve, snapshot.size_of(frozen.tensors))

    def start(self, frozen: FrozenCheckpoint) -> Future[Written]:
        """Start to write a checkpoint; return when training may go on. The result is a `RunError` if it fails."""
        self.prepare(frozen)
        host_memory = None if self._host_memory is None else self._host_memory.result()
        if host_memory is not None and host_memory.has_room(frozen.tensors):
            wait(self._under_way)  # the checkpoint before is read there
            frozen = replace(frozen, tensors=host_memory.copy(frozen.tensors))
            in_background = True
        else:
            if self._has_room is None:
                # Decided once, when the peak is that of updates alone: later it includes a checkpoint.
                self._has_room = self._reserve is None and has_room(frozen.bytes)
            in_background = self._has_room
        if in_background:
            mx.set_memory_limit(self._limit + granted_room())
        frozen = replace(frozen, tensors=fetched(frozen.tensors, to_host=self.reserves_memory))
        written = self._thread.submit(self._write, frozen)
        self._under_way = [written]
        if not in_background:
            wait(self._under_way)
        return written

    def prune(self, keep: int, protected: frozenset[int]) -> None:
        """Start to remove old checkpoints, as `checkpoints.prune`: for gigabytes that takes seconds.

        Raises:
            RunError: An earlier removal failed.
        """
        while self._removals and self._removals[0].done():
            self._removals.pop(0).result()
        self._removals.append(self._thread.submit(prune, self._run_dir, keep, protected))

    def close(self) -> BaseException | None:
        """Finish the checkpoint under way and all removals, and return the first error of these; may be called twice."""
        self._thread.shutdown()
        if self._host_memory is not None and (host_memory := self._host_memory.result()) is not None:
            host_memory.close()
        self._host_memory = None
        errors = [removal.exception() for removal in self._removals]
        self._removals.clear()
        return next(filter(None, errors), None)

    def _write(self, frozen: FrozenCheckpoint) -> Written:
        started_s = time.monotonic()
        try:
            return Written(frozen.write(self._run_dir), time.monotonic() - started_s)
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
