"""Find this machine's cores, memory and GPU memory, and divide them among the processes of a run. Loads no MLX.

Threads are divided because two processes with two BLAS threads each on two cores spend their time waiting for each
other. Memory is divided because a Mac panics if several processes each wire most of its memory.
"""

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

from grpo_actors.process import CACHE_LIMIT, CHECKPOINT_ROOM, MEMORY_LIMIT

BackEnd = Literal["cpu", "cuda", "metal"]

#: Share of the memory that all actors together may use. The machine's is also that of all other programs; a GPU's is not.
MEMORY_SHARE: dict[BackEnd, float] = {"cpu": 0.75, "metal": 0.75, "cuda": 0.95}
#: Distributions of MLX for CUDA. The one for CPUs has another name and is never installed together with them.
_CUDA_DISTRIBUTIONS = ("mlx-cuda-12", "mlx-cuda-13")
#: Seconds to wait for nvidia-smi.
_NVIDIA_SMI_S = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources that the processes of a run share."""

    back_end: BackEnd
    cores: int
    memory_bytes: int
    #: Memory of the GPU that MLX uses; on Metal it is the machine's memory. None if unknown or without a GPU.
    gpu_bytes: int | None = None

    @classmethod
    def here(cls, *, asks_gpu: bool) -> "Machine":
        """Describe this machine; with `asks_gpu`, run nvidia-smi for a CUDA GPU's memory, which may take a second."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if sys.platform == "darwin":
            return cls("metal", cores, memory, memory)
        if any(_is_installed(name) for name in _CUDA_DISTRIBUTIONS):
            return cls("cuda", cores, memory, cuda_bytes() if asks_gpu else None)
        return cls("cpu", cores, memory)

    @property
    def device_bytes(self) -> int | None:
        """Memory of the device that computes: the GPU's on CUDA, else the machine's. None if it is not known."""
        return self.gpu_bytes if self.back_end == "cuda" else self.memory_bytes

    @property
    def usable_bytes(self) -> float | None:
        """The part of it that all actors together may use."""
        known = self.device_bytes
        return None if known is None else known * MEMORY_SHARE[self.back_end]


@dataclass(frozen=True, slots=True)
class Share:
    """The threads and memory that one process may use."""

    threads: int
    #: Bytes of arrays, freed ones that MLX keeps included; 0: no limit.
    memory_bytes: int
    #: Bytes of freed arrays that MLX may keep; 0: the default of `process.bound_memory`.
    cache_bytes: int = 0
    #: Further bytes for a checkpoint that is written in the background.
    checkpoint_bytes: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that limit a process to this share."""
        return {
            "OPENBLAS_NUM_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            MEMORY_LIMIT: str(self.memory_bytes),
            CACHE_LIMIT: str(self.cache_bytes),
            CHECKPOINT_ROOM: str(self.checkpoint_bytes),
            "TOKENIZERS_PARALLELISM": "false",
            # Progress bars and advice of libraries would be noise between the run's own lines.
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONUNBUFFERED": "1",
        }


def equal_share(machine: Machine, processes: int) -> Share:
    """Return the share of each of `processes` equal processes; on CUDA, whose memory is another one, without a limit."""
    memory = 0.0 if machine.back_end == "cuda" else machine.memory_bytes * MEMORY_SHARE[machine.back_end]
    return Share(max(1, machine.cores // processes), int(memory / processes))


def worker_share(machine: Machine, others: int, workers: int) -> Share:
    """Return the share of each of up to `workers` workers; each of the `others` keeps its share with one worker.

    The share is fixed when the run starts, before the number of workers is known: a process cannot give back threads,
    and their number changes the last bits of what a CPU computes. So workers that are never started do not slow down
    the learner, and the first worker gets less than a single one only if more may follow.
    """
    alone = equal_share(machine, others + 1)
    left = max(1, machine.cores - others * alone.threads)
    return Share(max(1, left // workers), alone.memory_bytes // workers)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cuda_bytes() -> int | None:
    """Return the memory of the first visible GPU, which is the one MLX uses; None if nvidia-smi does not report it."""
    rows = nvidia_smi("--query-gpu=memory.total")
    try:
        return int(rows[0][0]) * 2**20  # nvidia-smi prints MiB
    except (ValueError, IndexError):
        return None


def nvidia_smi(query: str) -> list[list[str]]:
    """Return the lines of one query on the GPU that MLX uses, cut into cells; none if nvidia-smi fails."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={gpu}", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_S)
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
