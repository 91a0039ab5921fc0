"""Compare the plan of the learner's activations with the measured peak of an update of the largest shape."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from grpo_actors.bench.learner import sampled_groups
from grpo_actors.bench.random_model import config_json, write_folder
from grpo_actors.bench.workload import Shape, workload
from grpo_actors.config import load_config
from grpo_actors.learner.grpo import Grpo
from grpo_actors.policy.architectures import ARCHITECTURES, Architecture
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy
from grpo_actors.rundir.checkpoint_weights import freeze_checkpoint
from grpo_actors.supervisor.learner_memory import Trained, activation_bytes, largest_micro_batch, trained
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.memory_plan import plan_of
from grpo_actors.supervisor.model_files import Tensor, Widths

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
    assert unknown.scores == 32 * 150 * 150
    # On CUDA a row of such a model has a multiple of 128 tokens: the 2,000 of four groups fill 7 of 256.
    on_cuda = largest_micro_batch(config, Architecture(), "cuda")
    assert (on_cuda.tokens, on_cuda.row, on_cuda.logits) == (7 * 256, 256, 7 * 256)
    assert largest_micro_batch(config, Architecture(plain_head=True), "metal").logits == 32 * 50
    # A group that is shorter than three rows is a row.
    short = largest_micro_batch(small("num_generations=3"), ARCHITECTURES["llama"], "metal")
    assert (short.tokens, short.row) == (4 + 3 * 6, 4 + 3 * 6)


def small(*settings):
    """Settings of one group of two completions of 6 tokens, whose prompt has 4."""
    sizes = ("batch_size=1", "num_generations=2", "max_prompt_length=4", "max_new_tokens=6")
    return load_config(None, ["task=arithmetic", *sizes, *settings]).config


NOTHING = Trained(size=0, largest=0, moved=0, weights=0, training=0, snapshot=0)


def activations(
    config, back_end, width, *, known=ARCHITECTURES["llama"], vocabulary=0, delta=(0, 0), parts=NOTHING
):
    widths = Widths(2, 10, 20, heads=3, vocabulary=vocabulary, delta=delta[0], delta_layers=delta[1])
    return activation_bytes(config, known, widths=widths, parts=parts, width=width, back_end=back_end)


# A row of 4 + 2 · 6 = 16 tokens with 12 logits and 16² scores for each of 3 heads; on CUDA 1,024 tokens and logits, no scores.
# For each token a layer keeps 10 arrays of width 10 and 5 (on a GPU 2) of width 20, and 1.25 scores; its backward pass adds
# 18, 12 and 3.
@pytest.mark.parametrize(
    ("back_end", "width", "kept", "backward", "logits"),
    [
        ("cpu", 4, 16 * 200 + 960, 16 * 420 + 2304, 5 * 4 * 12),
        ("metal", 2, 16 * 140 + 960, 16 * 420 + 2304, 4.25 * 4 * 12),
        ("cuda", 2, 1024 * 140, 1024 * 420, 2.5 * 2 * 1024),
    ],
)
def test_activations_are_those_of_all_layers_and_the_larger_of_a_layers_backward_pass_and_the_logits(
    back_end, width, kept, backward, logits
):
    assert activations(small(), back_end, width) == width * (2 * kept + backward)
    assert activations(small(), back_end, width, vocabulary=10**6) == width * 2 * kept + logits * 10**6
    # One of the layers with the gated delta rule: it keeps 3 of the 10 arrays and no scores. Its backward pass adds 70 float32
    # for each of 16 or 1,024 tokens and of 1,000 elements.
    tokens, scores = (1024, 0) if back_end == "cuda" else (16, 960)
    without = kept - tokens * 70 - scores
    assert activations(small(), back_end, width, delta=(1000, 1)) == (
        width * (kept + without) + 280_000 * tokens
    )
    # With recomputation each layer keeps its input, and its backward pass begins with what a CPU keeps.
    again = tokens * 200 + scores
    recomputed = activations(small("gradient_checkpointing=true"), back_end, width)
    assert recomputed == width * (tokens * 10 * 2 + backward + again)


@pytest.mark.parametrize(
    ("back_end", "plain_head", "positions"),
    # Logits of 64 · 64 completion tokens: in parts of 1,024, two at a time. Without a plain head all at once, and those of
    # 64 prompts of 4 tokens too.
    [("metal", True, 2048), ("metal", False, 64 * 68), ("cuda", True, 2048), ("cpu", True, 4096)],
)
def test_a_gpu_computes_the_logits_of_a_plain_head_in_parts(back_end, plain_head, positions):
    many = small("num_generations=64", "max_new_tokens=64")
    known = ARCHITECTURES["llama"] if plain_head else Architecture()
    without, with_logits = (
        activations(many, back_end, 4, known=known, vocabulary=v) for v in (10**7, 2 * 10**7)
    )
    per_logit = {"cpu": 5 * 4, "metal": 4.25 * 4, "cuda": 2.5 * 4}[back_end]
    assert with_logits - without == per_logit * positions * 10**7


def test_activations_make_room_for_new_gradients_and_for_the_step():
    def peak(**sizes):
        parts = Trained(
            **{"size": 0, "largest": 0, "moved": 0, "weights": 0, "training": 0, "snapshot": 0} | sizes
        )
        return activations(small(), "cpu", 4, parts=parts)

    # At the beginning the new gradient of one array, at the end those of all beside one layer's backward pass.
    backward = 4 * (16 * 420 + 2304)
    assert peak(largest=10**6) == peak() + 6 * 10**6
    assert peak(size=10**6) == 6 * 10**6 + backward
    assert peak(moved=10**7) == 5 * 10**7


#: Two layers with a matrix, a norm and a stack of three experts each, between an embedding and a last norm.
LAYERED = [
    Tensor("model.embed_tokens.weight", (100, 8)),
    *(
        tensor
        for layer in range(2)
        for tensor in (
            Tensor(f"model.layers.{layer}.self_attn.q_proj.weight", (4, 8)),
            Tensor(f"model.layers.{layer}.norm.weight", (8,)),
            Tensor(f"model.layers.{layer}.mlp.experts.up_proj.weight", (3, 16, 8)),
        )
    ),
    Tensor("model.norm.weight", (8,)),
]
#: Rank 2: of a matrix rows + columns, twice; of each expert too.
OF_MATRIX, OF_STACK = 2 * (4 + 8), 3 * 2 * (16 + 8)


@pytest.mark.parametrize(
    ("settings", "size", "largest"),
    [
        ((), 2 * (OF_MATRIX + OF_STACK), 3 * 16 * 2),
        (("lora_layers=-1",), 2 * (OF_MATRIX + OF_STACK), 3 * 16 * 2),
        (("lora_layers=1",), OF_MATRIX + OF_STACK, 3 * 16 * 2),
        # A magnitude for each row.
        (("fine_tune_type=dora",), 2 * (OF_MATRIX + 4 + OF_STACK + 3 * 16), 3 * 16 * 2),
        (('lora_keys=["self_attn.q_proj"]',), 2 * OF_MATRIX, 8 * 2),
        (('lora_keys=["model.layers.1.self_attn.q_proj"]',), OF_MATRIX, 8 * 2),
        (('lora_keys=["none"]',), 0, 0),
    ],
)
def test_an_adapter_has_two_matrices_for_each_of_a_layer_and_none_for_a_vector(settings, size, largest):
    config = small("fine_tune_type=lora", "lora_rank=2", "kl_coeff=0", *settings)
    parts = trained(config, LAYERED, 2, 2)
    assert (parts.size, parts.largest, parts.moved, parts.weights) == (size, largest, size, 4 * size)
    # A gradient of 4 bytes and two means of 4; a checkpoint has the weights instead of the gradient.
    assert parts.training == (4 + 8) * size
    assert parts.snapshot == pytest.approx((4 + 8) * size, abs=5000)


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        # A row and a column of each matrix; a vector whole.
        ("adafactor", 4 * (100 + 8 + 2 * (4 + 8 + 8 + 3 * (16 + 8)) + 8)),
        # Muon moves matrices in layers; a stack, a vector and the embedding are AdamW's.
        ("muon", 4 * 2 * 4 * 8 + 8 * (800 + 2 * (8 + 3 * 16 * 8) + 8)),
    ],
)
def test_an_optimizers_state_follows_from_the_shape_of_each_array(optimizer, state):
    parts = trained(small("kl_coeff=0", f"optimizer={optimizer}"), LAYERED, 2, 4)
    assert parts.training == 4 * parts.size + state
    assert parts.largest == 800


@pytest.mark.parametrize(("fine_tune_type", "of_reference", "stored"), [("full", 2, 2 + 4), ("lora", 4, 4)])
def test_a_reference_that_changes_is_held_and_is_part_of_a_checkpoint(fine_tune_type, of_reference, stored):
    def of(*settings):
        config = small(f"fine_tune_type={fine_tune_type}", "optimizer=lion", *settings)
        return trained(config, LAYERED, 2, 2)

    without, fixed = of("kl_coeff=0"), of("kl_coeff=0.1")
    refreshed = of("kl_coeff=0.1", "reference_refresh_updates=1")
    size = without.size
    assert fixed.training - without.training == refreshed.training - without.training == of_reference * size
    assert fixed.snapshot == without.snapshot == (stored + 4) * size + 4096
    assert refreshed.snapshot - fixed.snapshot == of_reference * size


@pytest.fixture(scope="module")
def delta_model(tmp_path_factory):
    """The folder of a model of Qwen 3.5 in small: three layers with the gated delta rule, of 4 heads of 32, and one without."""
    folder = tmp_path_factory.mktemp("models") / "qwen3_5"
    described = config_json("qwen3.5-0.8b", "float32")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "vocab_size": 320}
    heads |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_attention_heads": 4}
    write_folder(folder, described | {"text_config": described["text_config"] | sizes | heads})
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", ("batch_size=4",)),
        ("llama", ("batch_size=1", "gradient_accumulation_steps=4")),
        ("llama", ("batch_size=4", "gradient_checkpointing=true")),
        ("llama", ("batch_size=4", "fine_tune_type=lora", "lora_rank=8")),
        ("qwen3_5", ("batch_size=1", "gradient_accumulation_steps=4")),
    ],
)
def test_an_update_of_the_largest_shape_stays_below_the_plan_and_near_it(family, settings, delta_model):
    location = EMBEDDED if family == "llama" else delta_model
    model = "tiny" if family == "llama" else delta_model
    sizes = ("num_generations=8", "max_prompt_length=96", "max_new_tokens=96", "kl_coeff=0")
    given = ["task=arithmetic", f"model_name={model}", "dtype=float32", "functions={correctness=1.0}", *sizes]
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
    need = plan_of(location, config, MACHINE).learner
    planned = sum(need.held.values()) + need.at_times["activations"]
    assert peak < planned < (1.7 if family == "llama" else 2) * peak


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
