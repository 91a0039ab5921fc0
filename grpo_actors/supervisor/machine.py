"""What this machine has: cores, memory, a GPU's memory; and each process's share of it. Loads no MLX.

Threads are divided: two processes with two BLAS threads each on two cores spend their time waiting for
each other. Memory is divided too: several processes that wire most of a Mac each panic it.
"""

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

from grpo_actors.process import MEMORY_LIMIT

#: Share of a memory that all actors together may use.
MEMORY_SHARE = 0.75
#: The distributions that hold MLX for CUDA; the one for a CPU is another, and never beside them.
_CUDA_DISTRIBUTIONS = ("mlx-cuda-12", "mlx-cuda-13")
_NVIDIA_SMI_S = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What the processes of a run divide."""

    back_end: Literal["cpu", "cuda", "metal"]
    cores: int
    memory_bytes: int
    #: Of the GPU that MLX uses. Metal's is the machine's own; None: not known, or there is none.
    gpu_bytes: int | None = None

    @classmethod
    def here(cls, *, asks_gpu: bool) -> "Machine":
        """This one; how much memory a CUDA GPU has is another program's to say, and may take it a second."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if sys.platform == "darwin":
            return cls("metal", cores, memory, memory)
        if any(_is_installed(name) for name in _CUDA_DISTRIBUTIONS):
            return cls("cuda", cores, memory, cuda_bytes() if asks_gpu else None)
        return cls("cpu", cores, memory)


@dataclass(frozen=True, slots=True)
class Share:
    """What one process may use."""

    threads: int
    memory_bytes: int

    @property
    def environment(self) -> dict[str, str]:
        """The variables that hold a process to it."""
        return {
            "OPENBLAS_NUM_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            MEMORY_LIMIT: str(self.memory_bytes),
            "TOKENIZERS_PARALLELISM": "false",
            # A library's bars and advice would be lines of noise between the run's own.
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONUNBUFFERED": "1",
        }


def equal_share(machine: Machine, processes: int) -> Share:
    """The share of each of so many processes."""
    return Share(max(1, machine.cores // processes), int(machine.memory_bytes * MEMORY_SHARE / processes))


def worker_share(machine: Machine, others: int, workers: int) -> Share:
    """The share of each of up to `workers`, where the `others` have what they would have beside one worker.

    It is fixed when the run starts, before it is known how many will come: a process cannot give back threads,
    and their number changes the last bits of what a CPU computes. So the learner is never slower for workers
    that never come, and the first worker has less than alone only where more may come.
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
    """Memory of the first GPU that is visible, which is MLX's; None where nobody tells."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_S)
        return int(told.stdout.split()[0]) * 2**20  # it tells MiB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
