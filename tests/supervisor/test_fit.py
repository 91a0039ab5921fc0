"""Test how the memory plan is shown, which runs it refuses, and the limits that it gives to processes."""

import shutil

import pytest
from machines import GB, certain, cpu, cuda, metal, total

from grpo_actors.config import load_config
from grpo_actors.errors import ConfigError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.fit import check_memory, limited, plan_text, scale, tight
from grpo_actors.supervisor.machine import Share
from grpo_actors.supervisor.memory_plan import Need, plan_of
from grpo_actors.supervisor.shares import Shares
from grpo_actors.supervisor.worker_pool import WorkerPool

SHARE = Share(2, 0)


def config(*overrides):
    return load_config(None, ["task=arithmetic", "model_name=tiny", "workers=2", *overrides]).config


def test_the_plan_has_a_line_for_each_process_below_the_device_that_they_share():
    machine = cuda(80 * GB)
    plan = plan_of(EMBEDDED, config(), machine)
    lines = plan_text(config(), allocate(config(), machine)).splitlines()
    assert [line.split()[0] for line in lines] == [
        "0.7",
        "GPU",
        "learner",
        "rollout-0",
        "rollout-1",
        "evaluator",
        "host",
    ]
    # 697,472 weights of 2 bytes, and 12 bytes of training each.
    assert "weights 0.00 GB, training 0.01 GB, activations" in lines[2]
    assert lines[2].endswith("CUDA 1.32 GB")
    assert lines[1] == f"GPU 0: {total(plan, 2) / 1e9:.2f} GB at most, of 80.00 GB"
    # 14 bytes a weight: its bfloat16 and float32 values, and two means.
    assert lines[-1] == "host       0.01 GB: the copy from which checkpoints are written"


def test_a_plan_that_does_not_count_all_says_so(tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    (folder / "config.json").write_text('{"n_embd": 4}')
    unknown = config(f"model_name={folder}")
    assert plan_text(unknown, allocate(unknown, cpu())).splitlines()[-1] == (
        "config.json does not tell the model's widths: no activations and KV caches are counted"
    )


def test_a_model_on_the_hub_has_no_plan_yet():
    text = plan_text(
        config("model_name=owner/name"),
        allocate(config("model_name=owner/name"), cuda(80 * GB, 80 * GB, None, None)),
    )
    assert text.splitlines() == [
        "owner/name is on the hub: its size is known once it is downloaded",
        "GPU 0: learner",
        "GPU 1: rollout-0, evaluator",
        "GPU 2: rollout-1",
        "GPU 3: idle",
    ]
    check_memory(allocate(config("model_name=owner/name"), cuda(1)))


def test_with_auto_the_plan_says_where_further_workers_would_run():
    several = config("workers=auto", "batch_size=16", "gradient_accumulation_steps=1")
    lines = plan_text(several, allocate(several, cuda(80 * GB, 80 * GB))).splitlines()
    assert lines[-2:] == [
        "each further worker: the same, on GPU 1, GPU 0",
        "rollout workers: at most 15 (16 cores)",
    ]


def test_a_run_is_refused_only_if_weights_training_and_contexts_alone_do_not_fit():
    plan = plan_of(EMBEDDED, config("kl_coeff=0"), cuda(80 * GB))
    # Four processes with a context each; 14 bytes a weight in the learner besides its own 2, 2 in each other.
    least = 4 * 1300 * 10**6 + 697_472 * (2 + 16 + 3 * 2)
    assert certain(plan, 2) == least
    check_memory(allocate(config("kl_coeff=0"), cuda(least)))
    with pytest.raises(
        ConfigError, match=r"memory: weights and training state must fit into 5\.22 GB of GPU 0, got 5\.22 GB"
    ):
        check_memory(allocate(config("kl_coeff=0"), cuda(least - 1)))
    # With one GPU no other one is advised.
    with pytest.raises(ConfigError, match=r"or take a smaller model$"):
        check_memory(allocate(config("kl_coeff=0"), cuda(least - 1)))
    check_memory(allocate(config("kl_coeff=0"), cuda(None)))


def test_a_run_is_refused_if_one_of_its_devices_has_too_little():
    plan = plan_of(EMBEDDED, config("kl_coeff=0"), cuda(80 * GB))
    both = 2 * plan.worker.certain + plan.of("evaluator").certain
    check_memory(allocate(config("kl_coeff=0"), cuda(plan.learner.certain, both)))
    refusal = r"must fit into 3\.90 GB of GPU 1, got 3\.90 GB \(rollout-0 .*, rollout-1 .*, evaluator .*or set rollout"
    with pytest.raises(ConfigError, match=refusal):
        check_memory(
            allocate(config("kl_coeff=0", "evaluator_device=1"), cuda(plan.learner.certain, both - 1))
        )


def test_a_run_that_may_need_too_much_starts_with_a_warning(tmp_path):
    plan = plan_of(EMBEDDED, config(), cuda(80 * GB))
    enough = Shares(config(), allocate(config(), cuda(total(plan, 2) / 0.95 + 1)))
    assert tight(plan, enough.allocation.placement) == enough.warnings == []
    scarce = Shares(config(), allocate(config(), cuda(total(plan, 2) / 0.95 - 1)))
    (warning,) = scarce.warnings
    assert "lower learner.batch_size" in warning
    assert plan_text(config(), scarce.allocation).splitlines()[-1] == warning
    notes = [text for text, _ in WorkerPool(tmp_path, config(), scarce, "ipc://none").revive(0)]
    assert notes == [f"memory: {warning}"]


def test_a_process_may_use_what_its_plan_says_and_all_of_them_together_what_there_is():
    need = Need(held={"weights": 6.0 * GB}, at_times={"a step": 4.0 * GB}, reused=4.0 * GB, context=1.0 * GB)
    assert limited(SHARE, need, 1.0) == Share(2, 10 * GB, 4 * GB)
    # Half of 10; MLX may keep half of that.
    assert limited(SHARE, need, 0.5) == Share(2, 5 * GB, int(2.5 * GB))
    # 0 would be no limit.
    assert limited(SHARE, Need(), 1.0) == Share(2, 1, 1)
    plan = plan_of(EMBEDDED, config(), cuda(80 * GB))
    unknown = cuda(None)
    assert scale(plan, allocate(config(), unknown).placement, unknown.devices[0]) == 1
    for machine, fits in ((cuda(80 * GB), 1), (cuda(total(plan, 2) / 2), pytest.approx(0.95 / 2, rel=1e-6))):
        (device,) = machine.devices
        assert scale(plan, allocate(config(), machine).placement, device) == fits


@pytest.mark.parametrize("machine", [cuda(80 * GB), cpu()])
def test_the_processes_get_the_limits_of_the_plan(machine):
    plan = plan_of(EMBEDDED, config(), machine)
    shares = Shares(config(), allocate(config(), machine))
    environments = {
        "learner": shares.learner(),
        "evaluator": shares.evaluator(),
        "worker": shares.worker(machine.devices[:1]),
    }
    for name, environment in environments.items():
        need = getattr(plan, name)
        limit = need.arrays - need.checkpoint
        assert int(environment["GRPO_ACTORS_MEMORY_LIMIT"]) == int(limit)
        assert int(environment["GRPO_ACTORS_CACHE_LIMIT"]) == int(min(need.reused, limit / 2))
        assert int(environment["GRPO_ACTORS_CHECKPOINT_ROOM"]) == int(need.checkpoint)
    # On CUDA the host's memory holds the copy.
    assert plan.learner.checkpoint == (0 if machine.back_end == "cuda" else plan.snapshot)
    assert plan.snapshot > 0 == plan.worker.checkpoint


def test_where_the_plan_does_not_fit_no_memory_is_set_aside_for_checkpoints():
    small = cpu(memory_gb=total(plan_of(EMBEDDED, config(), cpu()), 2) / 2 / GB)
    assert Shares(config(), allocate(config(), small)).learner()["GRPO_ACTORS_CHECKPOINT_ROOM"] == "0"


def test_without_a_plan_memory_is_divided_equally_where_it_is_the_machines():
    def limit(machine) -> str:
        return Shares(
            config("model_name=owner/name"), allocate(config("model_name=owner/name"), machine)
        ).learner()["GRPO_ACTORS_MEMORY_LIMIT"]

    # Three quarters of 64 GB among four processes; 0 is no limit.
    assert limit(metal()) == str(12 * GB)
    assert limit(cuda(80 * GB)) == "0"
