"""Allocate the machine to a run before it starts: the memory plan, the devices, and the most workers that it has room for.

This is done once for each start. What checks, shows and limits a run (`preflight`, `fit`, `shares`) is given the result, so
all of them speak of the same plan.

The limits on the workers of ``rollout.workers = "auto"`` are those known without a trial: leases, cores, memory
(`placement`). `headcount` measures whether that many workers pay.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.errors import ConfigError, os_errors_in_one_line
from grpo_actors.policy.locate import locate
from grpo_actors.ranks.processes import ranks_here
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


@dataclass(frozen=True, slots=True)
class Allocation:
    """What the processes of a run get of the machine."""

    machine: Machine
    #: The memory of each process; None if the model is on the hub, which tells no sizes.
    plan: Plan | None
    #: Where each process computes.
    placement: Placement
    #: The tightest limit on the workers, at least one.
    room: Room


@os_errors_in_one_line()
def allocate(config: Config, machine: Machine) -> Allocation:
    """Plan the memory of a run, and decide where its processes compute.

    Raises:
        GrpoActorsError: The model's files cannot be read, or a device does not exist; one line.
    """
    folder = locate(config.model.model_name)
    return _allocate(config, machine, plan_of(folder, config, machine) if isinstance(folder, Path) else None)


def room_beside(learner_bytes: float, config: Config, allocation: Allocation) -> Room:
    """Return the room of a run whose learner's arrays were measured to take so many bytes; 0: they were not.

    It is that of the start, unless the memory of the processes was not known then.
    """
    machine = allocation.machine
    # Without CUDA memory is divided when the run starts, before anything is measured.
    if allocation.plan is not None or not learner_bytes or machine.back_end != "cuda":
        return allocation.room
    return _allocate(config, machine, _as_large_as_the_learner(learner_bytes, config)).room


def _allocate(config: Config, machine: Machine, plan: Plan | None) -> Allocation:
    forced = _forced_room()
    most = forced or min(_limits(config, machine, plan), key=lambda room: room.workers)
    most = Room(max(1, most.workers), most.reason)
    ranks = ranks_here(config.learner.ranks)
    placement = place(config, machine.devices, plan, most_workers=most.workers, ranks=ranks)
    fitting = len(placement.workers + placement.further)
    if forced is None and fitting < most.workers:
        most = Room(fitting, _memory_reason(machine, plan))
    return Allocation(machine, plan, placement, most)


def _forced_room() -> Room | None:
    """Return the room that the environment sets; None if it sets none."""
    text = os.environ.get(MOST_WORKERS_VARIABLE)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{MOST_WORKERS_VARIABLE}: must be a number of workers, got {text!r}")
    return Room(int(text), f"{MOST_WORKERS_VARIABLE} says so")


def _limits(config: Config, machine: Machine, plan: Plan | None) -> Iterator[Room]:
    """Yield the limits other than memory."""
    devices = len(set(config.rollout.rollout_devices)) or len(machine.devices)
    yield Room(MOST_ON_DEVICE * devices, "more are never tried")
    batches = _open_batches(config)
    # Further workers would never hold a lease.
    yield Room(batches, f"{batches} batches of groups can be sampled at a time")
    if machine.back_end == "metal":
        yield Room(MOST_ON_METAL, "more would share one GPU and its memory")
    free_cores = machine.cores - _busy_cores(config, machine)
    yield Room(free_cores // config.rollout.rollout_ranks, f"{machine.cores} cores")
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
