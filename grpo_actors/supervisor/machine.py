"""Find this machine's cores, memory and devices, and divide cores and memory among the processes of a run. Loads no MLX.

Threads are divided because two processes with two BLAS threads each on two cores spend their time waiting for each
other. Memory is divided because a Mac panics if several processes each wire most of its memory.
"""

from dataclasses import dataclass, field

from grpo_actors import host
from grpo_actors.devices import MEMORY_SHARE, BackEnd, Device, back_end, find_gpus
from grpo_actors.process import CACHE_LIMIT, CHECKPOINT_ROOM, MEMORY_LIMIT


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources that the processes of a run share."""

    back_end: BackEnd
    cores: int
    memory_bytes: int
    #: The GPUs on CUDA; if none is listed there, one of unknown memory. Elsewhere one device with the machine's memory.
    gpus: tuple[Device, ...] = ()
    devices: tuple[Device, ...] = field(init=False)

    def __post_init__(self) -> None:
        memory = None if self.back_end == "cuda" else self.memory_bytes
        object.__setattr__(self, "devices", self.gpus or (Device(self.back_end, 0, memory),))

    @classmethod
    def here(cls, *, asks_gpu: bool) -> "Machine":
        """Describe this machine; with `asks_gpu`, run nvidia-smi for the CUDA GPUs, which may take a second."""
        found = back_end()
        gpus = find_gpus() if asks_gpu and found == "cuda" else ()
        return cls(found, host.cores(), host.memory_bytes(), gpus)

    @property
    def device_bytes(self) -> int | None:
        """Memory of the smallest device that computes. None if one's is not known."""
        known = [device.memory_bytes for device in self.devices if device.memory_bytes is not None]
        return min(known) if len(known) == len(self.devices) else None


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
    left = machine.cores - others * alone.threads
    return Share(max(1, left // workers), alone.memory_bytes // workers)
