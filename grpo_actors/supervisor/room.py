"""How many rollout workers a run has room for, with ``rollout.workers = "auto"``, and what bounds them.

Only what can be known without trying: leases, cores, memory. Whether that many pay is measured (`headcount`).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.policy.copies import may_copy
from grpo_actors.policy.locate import locate
from grpo_actors.supervisor.machine import MEMORY_SHARE, Machine, equal_share
from grpo_actors.supervisor.memory_plan import Plan, plan_of

#: The most that is ever tried. GRPO_ACTORS_MOST_WORKERS overrides it, and all other bounds.
MOST_WORKERS = 8
BY_HAND = "GRPO_ACTORS_MOST_WORKERS"
#: One GPU whose memory is also the machine's: a second process may fill gaps, more only divide it.
MOST_ON_METAL = 2
#: What a process on CUDA holds besides its arrays: driver context and kernels.
CUDA_CONTEXT_BYTES = 600_000_000


@dataclass(frozen=True, slots=True)
class Room:
    """The most workers, at least one, and why not more."""

    workers: int
    reason: str

    def __str__(self) -> str:
        return f"at most {self.workers} ({self.reason})"


def others_of(config: Config) -> int:
    """Processes of a run that compute and are no workers: the learner, and the evaluator where there is one."""
    return 1 + bool(config.evaluator.eval_every_updates)


def room_of(config: Config, machine: Machine, learner_bytes: float = 0.0) -> Room:
    """How many workers may come.

    Args:
        config: The settings.
        machine: Where they run.
        learner_bytes: The learner's measured peak, once there is one: it has activations, which no plan counts.
    """
    if BY_HAND in os.environ:
        return Room(max(1, int(os.environ[BY_HAND])), f"{BY_HAND} says so")
    most = min(_bounds(config, machine, learner_bytes), key=lambda room: room.workers)
    return most if most.workers >= 1 else Room(1, most.reason)


def _bounds(config: Config, machine: Machine, learner_bytes: float) -> Iterator[Room]:
    yield Room(MOST_WORKERS, "more are never tried")
    batches = _open_batches(config)
    # A worker beyond them would never hold a lease.
    yield Room(batches, f"{batches} batches of groups can be sampled at a time")
    if machine.back_end == "metal":
        yield Room(MOST_ON_METAL, "more would share one GPU and its memory")
    yield Room(machine.cores - _busy_cores(config, machine), f"{machine.cores} cores")
    yield _memory_bound(config, machine, learner_bytes)


def _busy_cores(config: Config, machine: Machine) -> int:
    """Cores that no worker should count on."""
    if machine.back_end != "cpu":
        return 1  # the learner launches its kernels from one, and so does each worker
    others = others_of(config)
    return others * equal_share(machine, others + 1).threads


def _open_batches(config: Config) -> int:
    """Batches that the lease table has open at a time."""
    groups, selection = config.groups_per_update, config.selection
    ahead = ceil(selection.oversampling * groups) if selection.replaces_groups else groups
    return ceil((config.rollout.max_staleness + 1) * ahead / config.rollout.batch_groups)


def _memory_bound(config: Config, machine: Machine, learner_bytes: float) -> Room:
    memory = machine.gpu_bytes if machine.back_end == "cuda" else machine.memory_bytes
    if memory is None:
        return Room(1, "nvidia-smi does not tell how much memory the GPU has")
    folder = locate(config.model.model_name)
    if isinstance(folder, Path):
        plan = plan_of(folder, config)
    elif machine.back_end != "cuda":  # there memory is divided now, before anything is measured
        return Room(1, "how large a model on the hub is is not known in time")
    elif learner_bytes:
        plan = _as_large_as_the_learner(learner_bytes)
    else:  # asked again with the learner's peak before a worker is added
        return Room(MOST_WORKERS, "more are never tried")
    context = copied = 0.0
    if machine.back_end == "cuda":
        context, copied = CUDA_CONTEXT_BYTES, plan.joined if may_copy(plan.joined, memory) else 0.0
    each = plan.worker + (0.0 if config.rollout.quantize_for_rollouts else copied) + plan.cache + context
    held = max(plan.learner, learner_bytes) + context
    if config.evaluator.eval_every_updates:
        held += plan.evaluator + copied + plan.cache + context
    if machine.back_end != "cuda":  # there each process is held to a share
        others = others_of(config)
        held = max(held, memory * MEMORY_SHARE * others / (others + 1))
    workers = int((memory * MEMORY_SHARE - held) // each)
    return Room(workers, f"a worker holds {each / 1e9:.2f} of {memory / 1e9:.0f} GB")


def _as_large_as_the_learner(size: float) -> Plan:
    """A bound, for want of files: a worker has the same weights, and the learner their gradients besides."""
    return Plan(parameters=0, float_bytes=0, learner=size, worker=size, cache=0, evaluator=size)
