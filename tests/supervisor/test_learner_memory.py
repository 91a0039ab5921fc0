"""Compare the plan of the learner's activations with the measured peak of an update of the largest shape."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from grpo_actors.bench.learner import sampled_groups
from grpo_actors.bench.workload import Shape, workload
from grpo_actors.config import load_config
from grpo_actors.learner.grpo import Grpo
from grpo_actors.policy.architectures import ARCHITECTURES, Architecture
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy
from grpo_actors.rundir.checkpoint_weights import freeze_checkpoint
from grpo_actors.supervisor.learner_memory import largest_micro_batch
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.memory_plan import plan_of

ON_CPU = mx.default_device().type == mx.DeviceType.cpu
MACHINE = Machine("cpu" if ON_CPU else "cuda" if mx.cuda.is_available() else "metal", 8, 64 * 10**9)


def test_the_largest_micro_batch_has_batch_size_groups_at_their_longest():
    settings = ("batch_size=4", "num_generations=8", "max_prompt_length=100", "max_new_tokens=50")
    config = load_config(None, ["task=arithmetic", *settings]).config
    batch = largest_micro_batch(config, ARCHITECTURES["llama"], "cpu")
    assert (batch.tokens, batch.row, batch.logits) == (4 * 100 + 32 * 50, 3 * 150, 32 * 50)
    assert batch.scores == 2000 * 450
    # On CUDA a row has 1,024 tokens, attention keeps no scores, and every token has logits.
    batch = largest_micro_batch(config, ARCHITECTURES["llama"], "cuda")
    assert (batch.tokens, batch.logits, batch.scores) == (1024, 1024, 0)
    # Of a model of which nothing is known: each completion with its prompt, and logits everywhere.
    unknown = largest_micro_batch(config, Architecture(), "cpu")
    assert unknown.tokens == unknown.logits == 32 * 150


@pytest.mark.parametrize(
    "settings",
    [
        ("batch_size=4",),
        ("batch_size=1", "gradient_accumulation_steps=4"),
        ("batch_size=4", "gradient_checkpointing=true"),
        ("batch_size=4", "fine_tune_type=lora", "lora_rank=8"),
    ],
)
def test_an_update_of_the_largest_shape_stays_below_the_plan_and_near_it(settings):
    sizes = ("num_generations=8", "max_prompt_length=96", "max_new_tokens=96", "kl_coeff=0")
    given = ["task=arithmetic", "model_name=tiny", "dtype=float32", "functions={correctness=1.0}", *sizes]
    config = load_config(None, [*given, "gradient_accumulation_steps=1", *settings]).config
    policy = load_policy(config.model, seed=0)
    groups = sampled_groups(workload(Shape(4, 8, prompt_tokens=96, tokens=96), 320), 320)
    grpo = Grpo(config, policy, total_updates=10)
    grpo.update(groups)
    mx.clear_cache()
    others = mx.get_active_memory() - sum(
        array.nbytes for _, array in tree_flatten([policy.model.parameters(), grpo.training.state()])
    )
    mx.reset_peak_memory()
    grpo.update(groups)
    peak = mx.get_peak_memory() - others
    need = plan_of(EMBEDDED, config, MACHINE).learner
    planned = sum(need.held.values()) + need.at_times["activations"]
    assert peak < planned < 1.7 * peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("fine_tune_type=lora",),
        ("fine_tune_type=dora",),
        ("optimizer=lion",),
        ("optimizer=muon",),
        ("optimizer=adafactor",),
        ("fine_tune_type=lora", "optimizer=adafactor"),
        ("fine_tune_type=dora", "optimizer=muon"),
        ("kl_coeff=0.1", "reference_refresh_updates=1"),
    ],
)
def test_the_plan_has_room_for_every_byte_of_a_checkpoint(settings, dtype):
    # One byte too few, and the learner would wait for every checkpoint.
    given = ["task=arithmetic", "model_name=tiny", f"dtype={dtype}", "functions={correctness=1.0}"]
    config = load_config(None, [*given, *settings]).config
    grpo = Grpo(config, load_policy(config.model, seed=0), total_updates=10)
    reference = grpo.reference if config.objective.reference_refresh_updates else None
    frozen = freeze_checkpoint(1, grpo.policy, grpo.training, {}, reference=reference)
    planned = plan_of(EMBEDDED, config, MACHINE).snapshot
    assert frozen.bytes <= planned < 1.02 * frozen.bytes
