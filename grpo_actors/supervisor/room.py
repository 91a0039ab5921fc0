"""Compute how many rollout workers a run with ``rollout.workers = "auto"`` has room for, and what the limit is.

The limits are those known without a trial: leases, cores, memory. `headcount` measures whether that many workers pay.
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

#: The most workers that are ever tried. The environment variable overrides this and all other limits.
MOST_WORKERS = 8
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


def room_of(config: Config, machine: Machine, learner_bytes: float = 0.0) -> Room:
    """Return the tightest limit, at least one worker.

    Args:
        config: The settings.
        machine: The machine on which the workers run.
        learner_bytes: Measured peak of the learner's arrays, if the plan is not known; 0 before the first measurement.
    """
    if MOST_WORKERS_VARIABLE in os.environ:
        most = int(os.environ[MOST_WORKERS_VARIABLE])
        return Room(max(1, most), f"{MOST_WORKERS_VARIABLE} says so")
    tightest = min(_limits(config, machine, learner_bytes), key=lambda room: room.workers)
    return tightest if tightest.workers >= 1 else Room(1, tightest.reason)


def _limits(config: Config, machine: Machine, learner_bytes: float) -> Iterator[Room]:
    yield Room(MOST_WORKERS, "more are never tried")
    batches = _open_batches(config)
    # Further workers would never hold a lease.
    yield Room(batches, f"{batches} batches of groups can be sampled at a time")
    if machine.back_end == "metal":
        yield Room(MOST_ON_METAL, "more would share one GPU and its memory")
    yield Room(machine.cores - _busy_cores(config, machine), f"{machine.cores} cores")
    yield _memory_limit(config, machine, learner_bytes)


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


def _memory_limit(config: Config, machine: Machine, learner_bytes: float) -> Room:
    memory, usable = machine.device_bytes, machine.usable_bytes
    if memory is None or usable is None:
        return Room(1, "nvidia-smi does not tell how much memory the GPU has")
    folder = locate(config.model.model_name)
    if isinstance(folder, Path):
        plan = plan_of(folder, config, machine)
    elif machine.back_end != "cuda":  # without CUDA, memory is divided now, before anything is measured
        return Room(1, "the size of a model on the hub is not known before the run starts")
    elif learner_bytes:
        plan = _as_large_as_the_learner(learner_bytes, config)
    else:  # computed again, with the learner's peak, before a worker is added
        return Room(MOST_WORKERS, "more are never tried")
    held, each = plan.total(0), plan.worker.total
    return Room(int((usable - held) // each), f"a worker holds {each / 1e9:.2f} of {memory / 1e9:.0f} GB")


def _as_large_as_the_learner(size: float, config: Config) -> Plan:
    """Return an upper bound without the model's files: a worker has the same weights, the learner also gradients."""
    need = Need(held={"arrays": size}, context=CUDA_CONTEXT_BYTES)
    evaluator = need if config.evaluator.eval_every_updates else None
    return Plan(parameters=0, float_bytes=0, learner=need, worker=need, evaluator=evaluator)
