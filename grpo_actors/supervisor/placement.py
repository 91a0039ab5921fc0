"""Decide on which device each process of a run computes: devices, settings and memory plan in, a placement out. Pure.

The ranks of the learner come first, one GPU each. Workers go to the other devices in turns, and to the learner's only
where the others are full or there are none; each rank of a worker has a GPU of its own, too. The evaluator goes where most memory is left, beside workers rather than
beside a learner, whom all wait for. Numbers set by hand win.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grpo_actors.config import Config
from grpo_actors.devices import Device, numbers
from grpo_actors.errors import ConfigError
from grpo_actors.supervisor.memory_plan import Plan, Role

#: The devices of one worker, by rank.
Devices = tuple[Device, ...]
#: With ``rollout.workers = "auto"``: the most workers that are ever tried on one device.
MOST_ON_DEVICE = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices of all processes of a run."""

    #: Of each rank of the learner.
    learner: Devices
    #: Of the workers with which the run begins.
    workers: tuple[Devices, ...]
    #: With ``rollout.workers = "auto"``: of those that may follow, in their order.
    further: tuple[Devices, ...] = ()
    #: None without an evaluator.
    evaluator: Device | None = None

    def actors(self, *, all_workers: bool = False) -> Iterator[tuple[str, Role, Device]]:
        """Yield name, role and device of each process; with `all_workers`, also of those that may follow."""
        for rank, device in enumerate(self.learner):
            yield f"learner-{rank}" if rank else "learner", "learner", device
        for number, devices in enumerate(self.workers + (self.further if all_workers else ())):
            for rank, device in enumerate(devices):
                yield f"rollout-{number}" + (f"-{rank}" if rank else ""), "worker", device
        if self.evaluator is not None:
            yield "evaluator", "evaluator", self.evaluator

    def is_shared(self, device: Device) -> bool:
        """Return whether several processes compute on the device, or may later."""
        return Counter(place for _, _, place in self.actors(all_workers=True))[device] > 1

    def next_worker(self, taken: Sequence[Devices]) -> Devices:
        """Return the devices of one more worker; `taken` are those of the workers that run."""
        left, places = Counter(taken), self.workers + self.further
        for place in places:
            if not left[place]:
                return place
            left[place] -= 1
        return min(places, key=taken.count)  # more workers than were planned for


def place(
    config: Config, devices: Sequence[Device], plan: Plan | None, *, most_workers: int, ranks: int
) -> Placement:
    """Decide where each process computes.

    Args:
        config: The settings.
        devices: The devices of this machine, at least one.
        plan: The memory of each process; None if it is not known: all then count alike.
        most_workers: With ``rollout.workers = "auto"``: the most workers for which there is anything else than memory; at
            least one.
        ranks: Ranks of the learner.

    Raises:
        ConfigError: A number set by hand is none of a device, or the ranks have not a GPU each.
    """
    loads = _Loads(devices, plan)
    learner = _learner_devices(config, devices, ranks)
    for device in learner:
        loads.put("learner", device)
    by_hand = _chosen_for_workers(config, devices)
    tiers = _worker_tiers(config, devices, learner, by_hand)
    workers = _first_workers(config, loads, tiers, by_hand, most_workers)
    # Before the workers that may follow: an evaluator surely comes.
    evaluator = _evaluator_device(config, devices, learner, loads)
    further: list[Devices] = []
    while config.rollout.workers == "auto" and len(workers) + len(further) < most_workers:
        found = loads.free_devices(tiers, for_trial=True)
        if found is None:
            break
        further.append(loads.put_worker(found))
    return Placement(learner, workers, tuple(further), evaluator)


def _worker_tiers(
    config: Config, devices: Sequence[Device], learner: Sequence[Device], by_hand: Sequence[Devices]
) -> list[Sequence[Devices]]:
    """Return where workers can be, in groups: the next group is for when those before have no room."""
    if by_hand:
        return [tuple(dict.fromkeys(by_hand))]
    ranks = config.rollout.rollout_ranks
    if _is_one_for_all(devices):
        return [[(devices[0],) * ranks]]
    if ranks > len(devices):
        raise ConfigError(
            f"rollout.rollout_ranks: must be at most {len(devices)}, the GPUs that this run sees (each rank needs its "
            f"own), got {ranks}"
        )
    others = [device for device in devices if device not in learner]
    tiers = [list(_places(tier, ranks)) for tier in (others, list(dict.fromkeys(learner)))]
    # What is left over of both makes up the rest.
    return [tier for tier in tiers if tier] or [list(_places(others + list(learner), ranks))]


def _places(devices: Sequence[Device], ranks: int) -> Iterator[Devices]:
    """Yield the devices in groups of one for each rank, without those that are left over."""
    for first in range(0, len(devices) - ranks + 1, ranks):
        yield tuple(devices[first : first + ranks])


def _first_workers(
    config: Config,
    loads: "_Loads",
    tiers: Sequence[Sequence[Devices]],
    by_hand: Sequence[Devices],
    most_workers: int,
) -> tuple[Devices, ...]:
    """Place the workers with which the run begins: with "auto" one on each place of the first tier."""
    wanted = config.rollout.workers
    if wanted == "auto":
        return tuple(loads.put_worker(place) for place in tiers[0][:most_workers])
    if by_hand:
        return tuple(loads.put_worker(by_hand[number % len(by_hand)]) for number in range(wanted))
    # Where there is room for none, each has its turn, and the run is refused or warned (`fit`).
    return tuple(
        loads.put_worker(loads.free_devices(tiers) or loads.least_used(tiers[0])) for _ in range(wanted)
    )


def _evaluator_device(
    config: Config, devices: Sequence[Device], learner: Sequence[Device], loads: "_Loads"
) -> Device | None:
    """Place the evaluator, if there is one."""
    number = config.evaluator.evaluator_device
    if not config.evaluator.eval_every_updates:
        return None
    if number == "auto":
        return loads.put("evaluator", loads.place_of_evaluator(learner))
    return loads.put("evaluator", *_chosen("evaluator.evaluator_device", (number,), devices))


def _learner_devices(config: Config, devices: Sequence[Device], ranks: int) -> tuple[Device, ...]:
    key = "learner.learner_devices"
    chosen = _chosen(key, config.learner.learner_devices, devices)
    if chosen and len(chosen) != ranks:
        raise ConfigError(f"{key}: must name one device for each of {ranks} ranks, got {len(chosen)}")
    if _is_one_for_all(devices):
        return (devices[0],) * ranks
    if ranks > len(devices):
        raise ConfigError(
            f"learner.ranks: must be at most {len(devices)}, the GPUs that this run sees (each rank needs its own), "
            f"got {ranks}"
        )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"{key}: must name another GPU for each rank, got {[each.number for each in chosen]}"
        )
    return chosen or tuple(devices[:ranks])


def _chosen_for_workers(config: Config, devices: Sequence[Device]) -> list[Devices]:
    """Return the devices of each worker in turn, as set by hand."""
    key = "rollout.rollout_devices"
    by_hand = list(
        _places(_chosen(key, config.rollout.rollout_devices, devices), config.rollout.rollout_ranks)
    )
    for place in by_hand:
        if len(set(place)) < len(place) and not _is_one_for_all(devices):
            raise ConfigError(
                f"{key}: must name another GPU for each rank of a worker, got {[each.number for each in place]}"
            )
    return by_hand


def _is_one_for_all(devices: Sequence[Device]) -> bool:
    """Return whether ranks share the one device: a GPU of CUDA takes one rank of a group."""
    return len(devices) == 1 and devices[0].back_end != "cuda"


def _chosen(key: str, chosen: Sequence[int], devices: Sequence[Device]) -> tuple[Device, ...]:
    """Return the devices of these numbers."""
    by_number = {device.number: device for device in devices}
    for number in chosen:
        if number not in by_number:
            raise ConfigError(f"{key}: must be among {numbers(devices)}, got {number}")
    return tuple(by_number[number] for number in chosen)


class _Loads:
    """What has been put on each device."""

    def __init__(self, devices: Sequence[Device], plan: Plan | None) -> None:
        self._devices = devices
        self._plan = plan
        self._bytes = dict.fromkeys(devices, 0.0)
        self._workers: Counter[Device] = Counter()

    def put(self, role: Role, device: Device) -> Device:
        self._bytes[device] += self._need(role)
        return device

    def put_worker(self, place: Devices) -> Devices:
        for device in place:
            self.put("worker", device)
        self._workers.update(set(place))
        return place

    def free_devices(self, tiers: Sequence[Sequence[Devices]], *, for_trial: bool = False) -> Devices | None:
        """Return the place with the fewest workers of those in the first tier with room for one more; None if none has.

        A device whose memory is not known has room, but not for a trial.
        """
        for tier in tiers:
            if roomy := [place for place in tier if self._has_room(place, "worker", for_trial=for_trial)]:
                return self.least_used(roomy)
        return None

    def least_used(self, among: Sequence[Devices]) -> Devices:
        """Return the first of the places with the fewest workers."""
        return min(among, key=lambda place: max(self._workers[device] for device in place))

    def place_of_evaluator(self, learner: Sequence[Device]) -> Device:
        """Return the device with most memory left, of those without a learner if one of them has room."""
        others = [device for device in self._devices if device not in learner]
        roomy = [device for device in others if self._has_room([device], "evaluator")]
        return max(roomy or self._devices, key=self._left)

    def _has_room(self, place: Sequence[Device], role: Role, *, for_trial: bool = False) -> bool:
        for device, processes in Counter(place).items():
            if for_trial and (device.usable_bytes is None or self._workers[device] >= MOST_ON_DEVICE):
                return False
            if device.usable_bytes is not None and self._left(device) < processes * self._need(role):
                return False
        return True

    def _left(self, device: Device) -> float:
        return (device.usable_bytes or 0.0) - self._bytes[device]

    def _need(self, role: Role) -> float:
        # Of an unknown model only the number of processes counts.
        return 1.0 if self._plan is None else self._plan.of(role).total
