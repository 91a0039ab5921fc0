"""Test what a run gets of various machines: one plan, room for so many workers, and a share for each process."""

import pytest
from machines import GB, cpu, cuda, metal, total

from grpo_actors.config import Config, load_config
from grpo_actors.errors import ConfigError, RunError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.process import CACHE_LIMIT, CHECKPOINT_ROOM, MEMORY_LIMIT
from grpo_actors.supervisor import machine as module
from grpo_actors.supervisor.allocation import MOST_WORKERS_VARIABLE, Room, allocate, room_beside
from grpo_actors.supervisor.machine import Machine, Share, equal_share, worker_share
from grpo_actors.supervisor.memory_plan import plan_of
from grpo_actors.supervisor.shares import Shares

#: 16 groups per update in batches of one, one update ahead: 32 batches are open, which limits nothing.
MANY = (
    "task=arithmetic",
    "model_name=tiny",
    "batch_size=16",
    "gradient_accumulation_steps=1",
    "workers=auto",
)


def config(*overrides):
    return load_config(None, [*MANY, *overrides]).config


def room_of(settings: Config, machine: Machine, learner_bytes: float = 0.0) -> Room:
    return room_beside(learner_bytes, settings, allocate(settings, machine))


# With an evaluator three processes divide the cores: 2 // 3 → 1 each, 8 // 3 = 2 each, 40 // 3 = 13 each.
@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (40, 8)])
def test_on_a_cpu_workers_get_the_cores_that_learner_and_evaluator_leave(cores, workers):
    assert room_of(config(), cpu(cores)).workers == workers


def test_on_a_gpu_each_worker_keeps_a_core_busy_and_eight_are_the_most():
    assert room_of(config(), cuda(80e9, cores=4)).workers == 3
    assert room_of(config(), cuda(80e9)).workers == 8
    two = cuda(80e9, 80e9, cores=32)
    assert room_of(config(), two) == Room(16, "more are never tried")
    assert room_of(config("rollout_devices=[1, 1]"), two) == Room(8, "more are never tried")


def test_a_mac_has_room_for_two():
    assert room_of(config(), metal()).workers == 2


def test_no_worker_is_added_that_would_never_hold_a_lease():
    # (1 + 1) updates × 16 groups in batches of 16: two batches. On-policy: one.
    assert str(room_of(config("batch_groups=16"), cuda(80e9))) == (
        "at most 2 (2 batches of groups can be sampled at a time)"
    )
    assert room_of(config("batch_groups=16", "max_staleness=0"), cuda(80e9)).workers == 1
    # Half as many groups again are sampled ahead where some may be replaced: 2 × 24 groups.
    more = ("batch_groups=16", "oversampling=1.5")
    assert room_of(config(*more, "dynamic_sampling=false"), cuda(80e9)).workers == 2
    assert room_of(config(*more, "dynamic_sampling=true"), cuda(80e9)).workers == 3


def test_each_rank_of_learner_and_workers_keeps_a_core_busy_or_has_its_threads():
    four = cuda(*[80e9] * 4, cores=9)
    assert str(room_of(config("rollout_ranks=2"), four)) == "at most 4 (9 cores)"
    # Two ranks of the learner and the evaluator: with one worker 8 // 4 cores each.
    assert room_of(config("ranks=2"), cpu(8)).workers == 2


def test_a_gpus_memory_limits_workers_by_the_plan():
    settings = config("dtype=float32")
    plan = plan_of(EMBEDDED, settings, cuda(80e9))
    # Nineteen twentieths of the memory hold the learner, the evaluator and three and a half workers.
    gpu = cuda((total(plan, 0) + 3.5 * plan.worker.total) / 0.95)
    room = room_of(settings, gpu)
    size = gpu.devices[0].memory_bytes
    assert room == Room(3, f"a worker holds {plan.worker.total / 1e9:.2f} of {size / 1e9:.0f} GB")
    two = room_of(settings, cuda(size, size, cores=64))
    assert two.reason.endswith(f" of {size / 1e9:.0f} + {size / 1e9:.0f} GB")


def test_with_a_model_on_the_hub_a_worker_counts_as_large_as_the_learner():
    unknown = config("model_name=owner/name", "eval_every_updates=0")
    assert room_of(unknown, cuda(80e9)).workers == 8  # computed again with the learner's measured peak
    # 0.95 × 80 = 76 GB: the learner's 11.3, and five workers of 11.3.
    assert room_of(unknown, cuda(80e9), 10 * GB).workers == 5
    # An evaluator takes 11.3 too.
    assert room_of(config("model_name=owner/name"), cuda(80e9), 10 * GB).workers == 4
    room = room_of(unknown, cpu(16), 10 * GB)
    assert room == Room(1, "the size of a model on the hub is not known before the run starts")


def test_no_worker_is_added_if_a_gpus_memory_is_unknown():
    nobody = room_of(config(), cuda(None))
    assert (nobody.workers, nobody.reason) == (1, "nvidia-smi does not tell how much memory the GPU has")


def test_memory_limits_workers_on_a_cpu_too():
    plan = plan_of(EMBEDDED, config(), cpu(64))
    # Three quarters of the memory hold the learner, the evaluator and two and a half workers.
    size = (total(plan, 0) + 2.5 * plan.worker.total) / 0.75
    assert room_of(config(), cpu(64, memory_gb=size / GB)).workers == 2


def test_a_measured_learner_changes_nothing_where_the_plan_is_known():
    assert room_of(config(), cuda(80e9), 70 * GB) == room_of(config(), cuda(80e9))


def test_the_environment_overrides_all_limits(monkeypatch):
    monkeypatch.setenv(MOST_WORKERS_VARIABLE, "3")
    assert room_of(config(), cpu(1)) == Room(3, "GRPO_ACTORS_MOST_WORKERS says so")
    assert room_of(config(), cuda(10**6)).workers == 3, "not even the memory"
    monkeypatch.setenv(MOST_WORKERS_VARIABLE, "0")
    assert room_of(config(), cpu(64)).workers == 1, "a run needs one"
    for wrong in ("many", "-1", "²", ""):
        monkeypatch.setenv(MOST_WORKERS_VARIABLE, wrong)
        refusal = f"^GRPO_ACTORS_MOST_WORKERS: must be a number of workers, got '{wrong}'$"
        with pytest.raises(ConfigError, match=refusal):
            room_of(config(), cpu(1))


def test_a_model_whose_files_cannot_be_read_is_one_line(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"model\.safetensors: Is a directory"):
        allocate(config(f"model_name={tmp_path}"), cpu())


def test_on_cuda_an_equal_share_is_one_of_threads_only():
    share = equal_share(cuda(80e9, cores=8), 2)
    assert share == Share(4, 0)
    assert {share.environment[name] for name in (MEMORY_LIMIT, CACHE_LIMIT, CHECKPOINT_ROOM)} == {"0"}


def test_learner_and_evaluator_keep_their_share_with_one_worker_and_workers_divide_the_rest():
    machine = cpu(8, memory_gb=32)
    # 8 // 3 cores and a third of 24 GB each; four workers divide the other 8 - 2 × 2 cores and the last third.
    assert equal_share(machine, 3) == Share(2, 8 * GB)
    assert worker_share(machine, others=2, workers=4) == Share(1, 2 * GB)
    assert worker_share(machine, others=2, workers=2) == Share(2, 4 * GB)
    assert worker_share(cpu(2), others=2, workers=2).threads == 1


def test_with_room_for_one_on_two_cores_the_share_is_that_of_a_fixed_worker():
    assert worker_share(cpu(2), others=2, workers=1) == equal_share(cpu(2), 3)


def test_with_auto_the_learner_has_the_threads_that_it_has_beside_one_worker():
    # 12 // 3.
    for workers in ("auto", "1"):
        settings = config(f"workers={workers}")
        assert Shares(settings, allocate(settings, cpu(12))).learner()["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("back_end", "asks_gpu", "is_asked"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_nvidia_smi_is_asked_only_where_cuda_computes(monkeypatch, back_end, asks_gpu, is_asked):
    gpus = cuda(80e9).gpus
    monkeypatch.setattr(module, "back_end", lambda: back_end)
    monkeypatch.setattr(module, "find_gpus", lambda: gpus)
    found = Machine.here(asks_gpu=asks_gpu)
    assert (found.back_end, found.gpus) == (back_end, gpus if is_asked else ())
    assert found.device_bytes == (80 * GB if is_asked else found.memory_bytes if back_end == "cpu" else None)
    assert [device.number for device in found.devices] == [0]
