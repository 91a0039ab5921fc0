"""Compute how many rollout workers a run with ``rollout.workers = "auto"`` has room for, and what the limit is.

The limits are those known without a trial: leases, cores, memory (`placement`). `headcount` measures whether that many
workers pay.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.learner.rank_processes import ranks_here
from grpo_actors.policy.locate import locate
from grpo_actors.supervisor.machine import Machine, equal_share
from grpo_actors.supervisor.memory_plan import CUDA_CONTEXT_BYTES, Need, Plan, plan_of
from grpo_actors.supervisor.placement import MOST_ON_DEVICE, Placement, place

#: Environment variable: overrides all limits on the number of workers.
MOST_WORKERS_VARIABLE = "GRPO_ACTORS_MOST_WORKERS"
#: On Metal there is one GPU, and its memory is the machine's: a second worker may fill gaps, more only divide the GPU.
MOST_ON_METAL = 2


@dataclass(frozen=True, slots=True)
class Room:
    """The most workers that there is room for, and the reason why not more."""

    workers: int
    reason: str

    def __str__(self) -> str:
        return f"at most {self.workers} ({self.reason})"


def other_processes(config: Config) -> int:
    """Return the number of computing processes that are not workers: the learner's, and the evaluator if there is one."""
    return ranks_here(config.learner.ranks) + bool(config.evaluator.eval_every_updates)


def find_plan(config: Config, machine: Machine) -> Plan | None:
    """Return the memory plan of a run; None if the model's files are not on this machine yet."""
    folder = locate(config.model.model_name)
    return plan_of(folder, config, machine) if isinstance(folder, Path) else None


def find_placement(config: Config, machine: Machine, learner_bytes: float = 0.0) -> tuple[Placement, Room]:
    """Return where the processes of a run compute, and the tightest limit on its workers, which is at least one.

    Args:
        config: The settings.
        machine: The machine on which the run is started.
        learner_bytes: Measured peak of the learner's arrays, if the plan is not known; 0 before the first measurement.

    Raises:
        ConfigError: as `place`.
    """
    plan = find_plan(config, machine)
    # Without CUDA memory is divided when the run starts, before anything is measured.
    if plan is None and learner_bytes and machine.back_end == "cuda":
        plan = _as_large_as_the_learner(learner_bytes, config)
    ranks = ranks_here(config.learner.ranks)
    if MOST_WORKERS_VARIABLE in os.environ:
        most = Room(max(1, int(os.environ[MOST_WORKERS_VARIABLE])), f"{MOST_WORKERS_VARIABLE} says so")
        return place(config, machine.devices, plan, most_workers=most.workers, ranks=ranks), most
    most = min(_limits(config, machine, plan), key=lambda room: room.workers)
    most = most if most.workers >= 1 else Room(1, most.reason)
    placement = place(config, machine.devices, plan, most_workers=most.workers, ranks=ranks)
    fitting = len(placement.workers + placement.further)
    return placement, most if most.workers <= fitting else Room(fitting, _memory_reason(machine, plan))


def _limits(config: Config, machine: Machine, plan: Plan | None) -> Iterator[Room]:
    """Yield the limits other than memory."""
    yield Room(MOST_ON_DEVICE * len(machine.devices), "more are never tried")
    batches = _open_batches(config)
    # Further workers would never hold a lease.
    yield Room(batches, f"{batches} batches of groups can be sampled at a time")
    if machine.back_end == "metal":
        yield Room(MOST_ON_METAL, "more would share one GPU and its memory")
    yield Room(machine.cores - _busy_cores(config, machine), f"{machine.cores} cores")
    if plan is None and machine.back_end != "cuda":
        yield Room(1, "the size of a model on the hub is not known before the run starts")


def _busy_cores(config: Config, machine: Machine) -> int:
    """Return the number of cores that are not available to workers."""
    if machine.back_end != "cpu":
        return 1  # the learner launches its kernels from one core, and so does each worker
    others = other_processes(config)
    return others * equal_share(machine, others + 1).threads


def _open_batches(config: Config) -> int:
    """Return the number of batches that the lease table has open at the same time."""
    groups, selection = config.groups_per_update, config.selection
    ahead = ceil(selection.oversampling * groups) if selection.replaces_groups else groups
    return ceil((config.rollout.max_staleness + 1) * ahead / config.rollout.batch_groups)


def _memory_reason(machine: Machine, plan: Plan | None) -> str:
    if any(device.memory_bytes is None for device in machine.devices):
        return "nvidia-smi does not tell how much memory the GPU has"
    each = 0.0 if plan is None else plan.worker.total
    sizes = " + ".join(f"{(device.memory_bytes or 0) / 1e9:.0f}" for device in machine.devices)
    return f"a worker holds {each / 1e9:.2f} of {sizes} GB"


def _as_large_as_the_learner(size: float, config: Config) -> Plan:
    """Return an upper bound without the model's files: a worker has the same weights, the learner also gradients."""
    need = Need(held={"arrays": size}, context=CUDA_CONTEXT_BYTES)
    evaluator = need if config.evaluator.eval_every_updates else None
    return Plan(parameters=0, float_bytes=0, learner=need, worker=need, evaluator=evaluator)
