"""Machines that tests describe, and the memory that a plan needs on one device."""

from grpo_actors.devices import Device
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.memory_plan import Plan

GB = 10**9


def cpu(cores: int = 8, memory_gb: float = 64) -> Machine:
    return Machine("cpu", cores, int(memory_gb * GB))


def metal(memory_gb: float = 64, cores: int = 16) -> Machine:
    return Machine("metal", cores, int(memory_gb * GB))


def cuda(*gpu_bytes: float | None, cores: int = 16) -> Machine:
    """Return a machine with a GPU of each size; None: nvidia-smi does not tell it."""
    gpus = tuple(
        Device("cuda", number, None if size is None else int(size), f"GPU-{number}")
        for number, size in enumerate(gpu_bytes)
    )
    return Machine("cuda", cores, 128 * GB, gpus)


def total(plan: Plan, workers: int) -> float:
    """Return the most bytes of a learner, an evaluator and some workers together."""
    return plan.learner.total + plan.of("evaluator").total + workers * plan.worker.total


def certain(plan: Plan, workers: int) -> float:
    """Return the bytes without which they cannot work."""
    return plan.learner.certain + plan.of("evaluator").certain + workers * plan.worker.certain
