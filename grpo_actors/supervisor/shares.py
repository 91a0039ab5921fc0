"""Divide the machine among the processes of a run: the device, the threads and the memory of each, as its environment."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from grpo_actors.config import Config
from grpo_actors.devices import Device, environment_of
from grpo_actors.supervisor.fit import limited, scale, tight
from grpo_actors.supervisor.machine import Machine, Share, equal_share, worker_share
from grpo_actors.supervisor.memory_plan import Plan, Role
from grpo_actors.supervisor.mps import mps_environment
from grpo_actors.supervisor.placement import Placement
from grpo_actors.supervisor.room import Room, find_placement, find_plan, other_processes


@dataclass
class Shares:
    """The shares of one run."""

    config: Config
    machine: Machine
    #: Where each process computes.
    placement: Placement = field(init=False)
    #: The most workers that there is room for when the run starts.
    room: Room = field(init=False)
    #: Folder of CUDA MPS; empty without it.
    mps_folder: str = ""

    def __post_init__(self) -> None:
        """Raises: ConfigError: as `placement.place`."""
        self.placement, self.room = find_placement(self.config, self.machine)

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of workers is found by measurement."""
        return self.config.rollout.workers == "auto"

    @property
    def warnings(self) -> list[str]:
        """What the user should know of the memory."""
        return [] if self._plan is None else tight(self._plan, self.placement)

    def learner(self) -> dict[str, str]:
        """Return the environment of the learner, which sees the GPUs of all its ranks and gives each rank its own.

        With "auto" its threads are the same as with one worker.
        """
        return self._environment("learner", self.placement.learner, self._share_of_others)

    def worker(self, device: Device) -> dict[str, str]:
        """Return the environment of a worker on a device."""
        if self.is_adaptive:
            share = worker_share(self.machine, other_processes(self.config), self.room.workers)
        else:
            share = self._share_of_others
        return self._environment("worker", [device], share)

    def evaluator(self) -> dict[str, str]:
        """Return the environment of the evaluator; without one, of a process that does not compute."""
        device = self.placement.evaluator
        return self._environment("evaluator", [] if device is None else [device], self._share_of_others)

    @cached_property
    def _plan(self) -> Plan | None:
        """The plan that all processes obey; None if the model's files are not on this machine yet."""
        plan = find_plan(self.config, self.machine)
        return plan if plan is not None and plan.is_whole else None  # else its limits would be too low

    @property
    def _share_of_others(self) -> Share:
        fixed = self.config.rollout.workers
        return equal_share(self.machine, other_processes(self.config) + (1 if fixed == "auto" else fixed))

    def _environment(self, role: Role, devices: Sequence[Device], share: Share) -> dict[str, str]:
        if self._plan is not None and devices:
            fits = min(scale(self._plan, self.placement, device) for device in devices)
            share = limited(share, self._plan.of(role), fits)
        mps = mps_environment(self.mps_folder) if any(map(self.placement.is_shared, devices)) else {}
        return {**share.environment, **environment_of(devices), **mps}
