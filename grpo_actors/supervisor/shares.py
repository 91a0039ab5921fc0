"""Divide the machine among the processes of a run: the device, the threads and the memory of each, as its environment."""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_actors.config import Config
from grpo_actors.devices import Device, environment_of
from grpo_actors.supervisor.allocation import Allocation, other_processes
from grpo_actors.supervisor.fit import limited, scale, tight
from grpo_actors.supervisor.machine import Share, equal_share, worker_share
from grpo_actors.supervisor.memory_plan import Plan, Role
from grpo_actors.supervisor.mps import mps_environment
from grpo_actors.supervisor.placement import Devices


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of one run."""

    config: Config
    allocation: Allocation
    #: Folder of CUDA MPS; empty without it.
    mps_folder: str = ""

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of workers is found by measurement."""
        return self.config.rollout.workers == "auto"

    @property
    def warnings(self) -> list[str]:
        """What the user should know of the memory."""
        return [] if self._plan is None else tight(self._plan, self.allocation.placement)

    def learner(self) -> dict[str, str]:
        """Return the environment of the learner, which sees the GPUs of all its ranks and gives each rank its own.

        With "auto" its threads are the same as with one worker.
        """
        return self._environment("learner", self.allocation.placement.learner, self._share_of_others)

    def worker(self, devices: Devices) -> dict[str, str]:
        """Return the environment of a worker, which sees the devices of all its ranks."""
        if self.is_adaptive:
            others = other_processes(self.config)
            processes = self.config.rollout.rollout_ranks * self.allocation.room.workers
            share = worker_share(self.allocation.machine, others, processes)
        else:
            share = self._share_of_others
        return self._environment("worker", devices, share)

    def evaluator(self) -> dict[str, str]:
        """Return the environment of the evaluator; without one, of a process that does not compute."""
        device = self.allocation.placement.evaluator
        return self._environment("evaluator", [] if device is None else [device], self._share_of_others)

    @property
    def _plan(self) -> Plan | None:
        """The plan that all processes obey; None if there is none, or it does not count all: its limits would be too low."""
        plan = self.allocation.plan
        return plan if plan is not None and plan.is_whole else None

    @property
    def _share_of_others(self) -> Share:
        fixed = self.config.rollout.workers
        ranks = self.config.rollout.rollout_ranks
        processes = other_processes(self.config) + ranks * (1 if fixed == "auto" else fixed)
        return equal_share(self.allocation.machine, processes)

    def _environment(self, role: Role, devices: Sequence[Device], share: Share) -> dict[str, str]:
        plan, placement = self._plan, self.allocation.placement
        if plan is not None and devices:
            fits = min(scale(plan, placement, device) for device in devices)
            share = limited(share, plan.of(role), fits)
        mps = mps_environment(self.mps_folder) if any(map(placement.is_shared, devices)) else {}
        return {**share.environment, **environment_of(devices), **mps}
