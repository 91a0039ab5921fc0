"""Test on which device each process of a run computes, for made-up machines."""

import pytest
from machines import GB, cpu, cuda, metal, total

from grpo_actors.config import load_config
from grpo_actors.errors import ConfigError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.memory_plan import plan_of
from grpo_actors.supervisor.placement import Placement, place
from grpo_actors.supervisor.shares import Shares

USABLE = 0.95
TWO, FOUR = cuda(80 * GB, 80 * GB), cuda(*[80 * GB] * 4)


def settings(*overrides):
    return load_config(None, ["task=arithmetic", "model_name=tiny", *overrides]).config


def placed(machine, *overrides, ranks=1, most=100, knows_model=True) -> Placement:
    config = settings(*overrides)
    plan = plan_of(EMBEDDED, config, machine) if knows_model else None
    return place(config, machine.devices, plan, most_workers=most, ranks=ranks)


def numbers(devices):
    return [device.number for device in devices]


def firsts(workers):
    """Numbers of the devices of workers of one rank each."""
    return [number for [number] in map(numbers, workers)]


def places(placement):
    """Name -> number of the device, of all that runs at the start."""
    return {name: device.number for name, _, device in placement.actors()}


@pytest.mark.parametrize("machine", [cpu(), metal(), cuda(80 * GB), cuda(None)])
def test_on_one_device_all_processes_share_it(machine):
    placement = placed(machine, "workers=2")
    assert places(placement) == {"learner": 0, "rollout-0": 0, "rollout-1": 0, "evaluator": 0}
    assert placement.is_shared(machine.devices[0])


def test_workers_and_evaluator_leave_the_learner_its_device():
    assert places(placed(TWO)) == {"learner": 0, "rollout-0": 1, "evaluator": 1}
    # The evaluator goes where most memory is left, without a worker.
    assert places(placed(FOUR, "workers=2")) == {
        "learner": 0,
        "rollout-0": 1,
        "rollout-1": 2,
        "evaluator": 3,
    }
    assert not placed(FOUR, "workers=2").is_shared(FOUR.devices[0])


def test_workers_take_turns_on_the_devices_without_a_rank():
    placement = placed(FOUR, "workers=5", ranks=2)
    assert numbers(placement.learner) == [0, 1]
    assert firsts(placement.workers) == [2, 3, 2, 3, 2]
    assert list(places(placement))[:2] == ["learner", "learner-1"]
    # All four train, so the workers share their devices.
    assert firsts(placed(FOUR, "workers=5", ranks=4).workers) == [0, 1, 2, 3, 0]


def test_an_unknown_model_is_placed_by_the_number_of_processes():
    assert places(placed(FOUR, "workers=3", knows_model=False)) == {
        "learner": 0,
        "rollout-0": 1,
        "rollout-1": 2,
        "rollout-2": 3,
        "evaluator": 1,
    }


def test_a_worker_that_does_not_fit_beside_the_others_goes_to_the_learners_device():
    plan = plan_of(EMBEDDED, settings(), TWO)
    two = 2.5 * plan.worker.total / USABLE
    placement = placed(cuda(80 * GB, two), "workers=4", "eval_every_updates=0")
    assert firsts(placement.workers) == [1, 1, 0, 0]
    # Where nothing fits it has its turn on the others, and the run is refused or warned (`fit`).
    placement = placed(cuda(GB, two), "workers=4", "eval_every_updates=0")
    assert firsts(placement.workers) == [1, 1, 1, 1]


def test_the_evaluator_goes_beside_the_learner_if_only_there_is_room():
    plan = plan_of(EMBEDDED, settings(), TWO)
    one = 1.5 * plan.worker.total / USABLE
    assert places(placed(cuda(80 * GB, one)))["evaluator"] == 0
    assert places(placed(cuda(80 * GB, 80 * GB)))["evaluator"] == 1


def test_auto_begins_with_a_worker_on_each_other_device_and_fills_them_before_the_learners():
    plan = plan_of(EMBEDDED, settings(), FOUR)
    learners = (plan.learner.total + 1.5 * plan.worker.total) / USABLE
    two = (2.5 * plan.worker.total + plan.of("evaluator").total) / USABLE
    machine = cuda(learners, two, two)
    placement = placed(machine, "workers=auto")
    assert firsts(placement.workers) == [1, 2]
    # The evaluator has the room of one on GPU 1; GPU 2 has a third worker instead.
    assert places(placement)["evaluator"] == 1
    assert firsts(placement.further) == [1, 2, 2, 0]
    assert firsts(placed(machine, "workers=auto", most=3).further) == [1]
    assert firsts(placed(machine, "workers=auto", most=1).workers) == [1]


def test_auto_tries_no_worker_where_the_memory_is_unknown_and_at_most_eight_on_a_device():
    assert placed(cuda(None, None), "workers=auto").further == ()
    everywhere = placed(TWO, "workers=auto")
    assert firsts(everywhere.workers + everywhere.further) == [1] * 8 + [0] * 8
    # It may share GPU 0 with the learner later, but does not yet.
    assert places(everywhere) == {"learner": 0, "rollout-0": 1, "evaluator": 1}
    assert everywhere.is_shared(TWO.devices[0])
    [first] = everywhere.workers
    assert everywhere.next_worker([first]) == first
    # A user may ask for more, and the evaluator comes in any case.
    assert firsts(placed(TWO, "workers=9").workers) == [1] * 9
    assert places(placed(TWO, "workers=8"))["evaluator"] == 1


def test_one_more_worker_takes_the_first_free_place():
    placement = placed(FOUR, "workers=auto", most=5)
    gpu = [(device,) for device in FOUR.devices]
    assert firsts(placement.workers + placement.further) == [1, 2, 3, 1, 2]
    assert placement.next_worker([]) == gpu[1]
    assert placement.next_worker([gpu[1], gpu[2]]) == gpu[3]
    # One that died is replaced on its own device.
    assert placement.next_worker([gpu[1], gpu[3], gpu[1]]) == gpu[2]
    assert placement.next_worker([gpu[1], gpu[2], gpu[3], gpu[1], gpu[2]]) == gpu[3]


def test_devices_are_set_by_hand():
    placement = placed(
        FOUR, "workers=5", "learner_devices=[3]", "rollout_devices=[0, 1, 1]", "evaluator_device=3"
    )
    assert numbers(placement.learner) == [3]
    assert firsts(placement.workers) == [0, 1, 1, 0, 1]
    assert placement.evaluator == FOUR.devices[3]
    assert firsts(placed(FOUR, "workers=2", "learner_devices=[1, 0]", ranks=2).workers) == [2, 3]
    # With "auto" a worker begins on each.
    automatic = placed(FOUR, "workers=auto", "rollout_devices=[2, 0]", most=3)
    assert firsts(automatic.workers + automatic.further) == [2, 0, 2]


@pytest.mark.parametrize(
    ("override", "ranks", "rule"),
    [
        ("rollout_devices=[0, 2]", 1, "rollout.rollout_devices: must be among 0 (GPU 0), 1 (GPU 1), got 2"),
        ("evaluator_device=7", 1, "evaluator.evaluator_device: must be among 0 (GPU 0), 1 (GPU 1), got 7"),
        (
            "learner_devices=[0, 1]",
            1,
            "learner.learner_devices: must name one device for each of 1 ranks, got 2",
        ),
        ("learner_devices=[1, 1]", 2, "learner.learner_devices: must name another GPU for each rank, got [1, 1]"),
        (
            "workers=1",
            3,
            "learner.ranks: must be at most 2, the GPUs that this run sees (each rank needs its own), got 3",
        ),
        (
            "rollout_ranks=4",
            1,
            "rollout.rollout_ranks: must be at most 2, the GPUs that this run sees (each rank needs its own), got 4",
        ),
        (
            "rollout_ranks=2; rollout_devices=[1, 1]",
            1,
            "rollout.rollout_devices: must name another GPU for each rank of a worker, got [1, 1]",
        ),
    ],
)  # fmt: skip
def test_devices_that_do_not_exist_or_do_not_suffice_are_refused(override, ranks, rule):
    with pytest.raises(ConfigError) as refused:
        placed(TWO, *override.split("; "), ranks=ranks)
    assert str(refused.value) == rule


def test_ranks_never_share_a_gpu_of_cuda():
    with pytest.raises(ConfigError, match=r"^learner\.ranks: must be at most 1, .*, got 2$"):
        placed(cuda(80 * GB), ranks=2)
    with pytest.raises(ConfigError, match=r"^rollout\.rollout_ranks: must be at most 1, .*, got 2$"):
        placed(cuda(80 * GB), "rollout_ranks=2")


def test_ranks_on_a_cpu_share_it():
    assert numbers(placed(cpu(), ranks=3).learner) == [0, 0, 0]


def test_each_rank_of_a_worker_has_a_device_of_its_own():
    # What is left beside them is for the evaluator.
    assert places(placed(FOUR, "workers=2", "rollout_ranks=2")) == {
        "learner": 0,
        "rollout-0": 1,
        "rollout-0-1": 2,
        "rollout-1": 1,
        "rollout-1-1": 2,
        "evaluator": 3,
    }
    # Where too few are left beside the learner, one of the ranks shares its device.
    assert places(placed(TWO, "workers=1", "rollout_ranks=2"))["rollout-0-1"] == 0
    by_hand = placed(FOUR, "workers=2", "rollout_ranks=2", "rollout_devices=[3, 2, 1, 0]")
    assert [*map(numbers, by_hand.workers)] == [[3, 2], [1, 0]]
    automatic = placed(FOUR, "workers=auto", "rollout_ranks=2", most=2)
    assert [*map(numbers, automatic.workers + automatic.further)] == [[1, 2], [1, 2]]
    assert [*map(numbers, placed(cpu(), "workers=1", "rollout_ranks=2").workers)] == [[0, 0]]


def test_a_worker_sees_the_devices_of_its_ranks():
    config = settings("workers=1", "rollout_ranks=2", "eval_every_updates=0")
    allocation = allocate(config, cuda(80 * GB, 80 * GB, 80 * GB))
    [devices] = allocation.placement.workers
    assert Shares(config, allocation).worker(devices)["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"


# --- what each process gets ---------------------------------------------------------------------------


def test_each_process_gets_its_gpu_and_those_that_share_one_get_mps():
    allocation = allocate(settings("workers=2"), cuda(80 * GB, 80 * GB, 80 * GB))
    shares = Shares(settings("workers=2"), allocation, "/mps")
    one, two, three = allocation.machine.devices
    seen = {
        name: (environment["CUDA_VISIBLE_DEVICES"], environment.get("CUDA_MPS_PIPE_DIRECTORY"))
        for name, environment in {
            "learner": shares.learner(),
            "worker 0": shares.worker((two,)),
            "worker 1": shares.worker((three,)),
            "evaluator": shares.evaluator(),
        }.items()
    }
    assert allocation.placement.evaluator == two
    assert seen == {
        "learner": ("GPU-0", None),
        "worker 0": ("GPU-1", "/mps"),
        "worker 1": ("GPU-2", None),
        "evaluator": ("GPU-1", "/mps"),
    }
    assert shares.learner()["GRPO_ACTORS_DEVICE"] == one.name


def test_limits_are_those_of_the_own_device():
    machine = cuda(80 * GB, 80 * GB)
    plan = plan_of(EMBEDDED, settings(), machine)
    # Half of what two workers and the evaluator need.
    small = cuda(80 * GB, (total(plan, 2) - plan.learner.total) / 2 / USABLE)
    by_hand = settings("workers=2", "rollout_devices=[1]", "evaluator_device=1")
    shares = Shares(by_hand, allocate(by_hand, small))
    limits = [
        int(environment["GRPO_ACTORS_MEMORY_LIMIT"])
        for environment in (shares.learner(), shares.worker((small.devices[1],)), shares.evaluator())
    ]
    assert limits == [
        int(plan.learner.arrays),
        pytest.approx(plan.worker.arrays / 2, rel=1e-6),
        pytest.approx(plan.of("evaluator").arrays / 2, rel=1e-6),
    ]
