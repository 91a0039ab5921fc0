"""Test the memory plan, which is computed from the model's files only."""

import json
import shutil

import mlx_lm.utils
import pytest
from machines import GB, cpu, cuda, metal
from mlx.utils import tree_flatten

from grpo_actors.bench.random_model import build, config_json
from grpo_actors.config import load_config
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.memory_plan import (
    CUDA_CONTEXT_BYTES,
    CUDA_KEPT_BYTES,
    CUDA_LEARNER_SLACK,
    CUDA_SLACK,
    Need,
    plan_of,
)
from grpo_actors.supervisor.shares import Shares

# Embedding 320·128; four layers of 4·128² attention, 3·128·256 MLP, 2·128 norms; one last norm.
MATRICES_IN_LAYERS = 4 * (4 * 128**2 + 3 * 128 * 256)
NORMS = 4 * 2 * 128 + 128
PARAMETERS = 320 * 128 + MATRICES_IN_LAYERS + NORMS

CPU, CUDA = cpu(), cuda(80 * GB)


def plan(*overrides, folder=EMBEDDED, machine=CPU):
    config = load_config(None, ["task=arithmetic", "dtype=float32", *overrides]).config
    return plan_of(folder, config, machine)


def held(*overrides):
    return sum(plan(*overrides).learner.held.values())


def test_the_embedded_models_parameters_are_counted_from_its_header():
    assert plan().parameters == PARAMETERS


def test_only_on_cuda_a_process_holds_a_context_and_copies_of_the_projections_that_one_product_replaces():
    on_cuda = plan("dtype=bfloat16", machine=CUDA)
    # Four layers' q, k and v of 128 × 128, gate and up of 256 × 128, in bfloat16.
    assert on_cuda.worker.at_times["copies of weights"] == 4 * (3 * 128 + 2 * 256) * 128 * 2
    assert on_cuda.learner.context == CUDA_CONTEXT_BYTES
    on_cpu = plan("dtype=bfloat16")
    assert (on_cpu.worker.at_times["copies of weights"], on_cpu.learner.context) == (0, 0)


def test_a_copy_of_weights_counts_only_if_it_may_be_made():
    # 917,504 bytes are more than an eighth of seven million.
    small = cuda(7 * 10**6)
    assert plan("dtype=bfloat16", machine=small).worker.at_times["copies of weights"] == 0
    divided = plan("dtype=bfloat16", "rollout_ranks=2", machine=CUDA)
    assert divided.worker.at_times["copies of weights"] == 0 < divided.evaluator.at_times["copies of weights"]
    packed = plan("fine_tune_type=lora", "base_bits=4", machine=CUDA)
    assert {packed.worker.at_times["copies of weights"], packed.evaluator.at_times["copies of weights"]} == {
        0
    }
    assert (
        plan("rollout_bits=8", "quantize_for_rollouts=true", machine=CUDA).worker.at_times[
            "copies of weights"
        ]
        == 0
    )


def test_the_type_of_the_weights_is_float32_on_a_cpu_and_the_files_on_a_gpu(tmp_path):
    assert plan("dtype=auto").float_bytes == 4
    assert plan("dtype=auto", machine=CUDA).float_bytes == 2
    assert plan("dtype=auto", machine=metal()).float_bytes == 2
    assert plan("dtype=float16").float_bytes == 2
    wide = changed_model(tmp_path, lambda config: config | {"torch_dtype": "float32"})
    assert plan("dtype=auto", folder=wide, machine=CUDA).float_bytes == 4


def test_a_need_counts_what_is_held_what_comes_at_times_and_what_is_not_of_arrays():
    need = Need(
        held={"weights": 6 * GB},
        at_times={"a step": 3 * GB, "checkpoint": 1 * GB, "nothing": 0.0},
        context=2 * GB,
        slack=0.5,
    )
    assert (need.arrays, need.checkpoint, need.certain) == (10 * GB, 1 * GB, 8 * GB)
    assert (need.overhead, need.total) == (2 * GB + 5 * GB, 17 * GB)
    parts = "weights 6.00 GB, a step 3.00 GB, checkpoint 1.00 GB, CUDA 7.00 GB"
    assert str(need) == f"17.00 GB: {parts}"
    assert Need().checkpoint == 0


def test_only_on_cuda_a_process_has_slack_and_a_learner_keeps_few_freed_arrays():
    large = ("batch_size=64", "num_generations=64")
    on_cuda, on_cpu = plan(*large, machine=CUDA), plan(*large)
    assert (on_cuda.learner.slack, on_cuda.worker.slack) == (CUDA_LEARNER_SLACK, CUDA_SLACK)
    assert on_cuda.evaluator.slack == CUDA_SLACK
    assert {on_cpu.learner.slack, on_cpu.worker.slack, on_cpu.evaluator.slack} == {0}
    assert on_cuda.learner.reused == CUDA_KEPT_BYTES < on_cuda.learner.at_times["activations"]
    assert on_cpu.learner.reused == on_cpu.learner.at_times["activations"] > CUDA_KEPT_BYTES
    small = plan("batch_size=1", "num_generations=2", machine=CUDA).learner
    assert small.reused == small.at_times["activations"] < CUDA_KEPT_BYTES


def test_a_sampler_has_room_for_a_step_or_for_new_weights_and_may_keep_those_of_a_step():
    # A prefill of one token, or logits of one row, is less than the weights that arrive.
    short = ("batch_groups=1", "num_generations=2", "max_prompt_length=1", "max_new_tokens=1")
    worker = plan(*short).worker
    assert worker.reused < worker.at_times["a step"] == 4 * PARAMETERS
    busy = plan("batch_groups=4", "num_generations=64").worker
    assert busy.reused == busy.at_times["a step"] > 4 * PARAMETERS


def test_without_an_evaluator_nothing_is_counted_for_it():
    alone = plan("eval_every_updates=0")
    assert alone.evaluator is None
    assert alone.of("evaluator").total == 0
    assert (alone.of("learner"), alone.of("worker")) == (alone.learner, alone.worker)


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        ("adamw", 8 * PARAMETERS),
        ("adam", 8 * PARAMETERS),
        ("lion", 4 * PARAMETERS),
        # Rows and columns: of the embedding 320 + 128, of each layer four of 128 × 128 and three of 128 × 256; nine norms.
        ("adafactor", 4 * (448 + 4 * (4 * 256 + 3 * 384) + 9 * 128)),
        ("muon", 4 * MATRICES_IN_LAYERS + 8 * (PARAMETERS - MATRICES_IN_LAYERS)),
    ],
)
def test_an_optimizer_holds_its_means(optimizer, state):
    assert held(f"optimizer={optimizer}", "kl_coeff=0") == 8 * PARAMETERS + state  # weights and gradient
    # Also float32 weights and the reference.
    assert held(f"optimizer={optimizer}", "kl_coeff=0.1", "dtype=bfloat16") == (12 * PARAMETERS + state)


def test_a_checkpoint_copies_weights_and_state_but_not_the_frozen_base_of_an_adapter():
    assert 0 <= plan("dtype=bfloat16").learner.checkpoint - (2 + 4 + 8) * PARAMETERS < 5000
    # An adapter is float32: itself and two means, of the size that the next test derives.
    adapter = plan("fine_tune_type=lora", "lora_rank=2").learner.at_times["checkpoint"]
    assert 0 <= adapter - 12 * 2 * 4 * (4 * 256 + 3 * 384) < 5000


def test_on_cuda_a_checkpoint_takes_memory_of_the_host_and_none_of_the_gpu():
    on_cuda = plan("dtype=bfloat16", machine=CUDA)
    assert on_cuda.learner.checkpoint == 0
    assert on_cuda.snapshot == plan("dtype=bfloat16").learner.checkpoint


def test_a_quantised_base_and_its_adapter_are_small_in_every_process():
    # 4 bits, and for each 64 weights a scale and an offset of 4 bytes: 5 bits a weight. The norms stay.
    base = (PARAMETERS - NORMS) * 5 / 8 + 4 * NORMS
    # Rank 2: rows + columns, twice. Of 4 · (4 of 128 × 128 and 3 of 128 × 256); 16 bytes each with AdamW.
    adapter = 2 * 4 * (4 * 256 + 3 * 384)
    settings = ("fine_tune_type=lora", "base_bits=4", "lora_rank=2", "kl_coeff=0")
    small = plan(*settings)
    assert small.learner.certain == base + 16 * adapter
    assert small.worker.certain == small.evaluator.certain == base + 4 * adapter
    assert held(*settings, "lora_layers=1", 'lora_keys=["self_attn.q_proj"]') == base + 16 * 2 * 256


def test_only_workers_quantise_for_rollouts():
    quantised = plan("quantize_for_rollouts=true", "rollout_bits=8")
    assert (
        quantised.worker.certain == (PARAMETERS - NORMS) * 9 / 8 + 4 * NORMS
    )  # 8 bits and 64 for 64 weights
    assert quantised.evaluator.certain == 4 * PARAMETERS


def test_a_quantised_cache_is_smaller_in_workers_and_needs_no_copies_of_weights():
    settings = (
        "dtype=bfloat16",
        "batch_groups=2",
        "num_generations=4",
        "max_prompt_length=100",
        "max_new_tokens=100",
    )
    computed, packed = (plan(*settings, bits, machine=CUDA) for bits in ("kv_bits=0", "kv_bits=4"))
    # Keys and values of 128 numbers in four layers, 8 rows of 256 columns and two prompts of 100 tokens.
    assert computed.worker.at_times["KV cache"] == 256 * 4 * 2 * (8 * 256 + 2 * 100)
    # The rows' numbers have 4 bits, and for each 32 a scale and an offset of 2 bytes: 5 bits. Two layers are unpacked.
    rows = 8 * 256 * (4 * 5 / 8 + 2 * 2)
    assert packed.worker.at_times["KV cache"] == 256 * (rows + 4 * 2 * 2 * 100)
    assert packed.evaluator == computed.evaluator
    assert packed.worker.at_times["copies of weights"] == 0 < computed.worker.at_times["copies of weights"]


def test_a_folder_that_is_quantised_already_counts_as_unpacked(tmp_path):
    model, tokenizer, config = mlx_lm.utils.load(str(EMBEDDED), return_config=True)
    model, config = mlx_lm.utils.quantize_model(model, config, group_size=64, bits=4)
    mlx_lm.utils.save(tmp_path / "small", str(EMBEDDED), model, tokenizer, config)
    small = plan("fine_tune_type=lora", folder=tmp_path / "small")
    assert small.parameters == PARAMETERS
    adapter = small.learner.at_times["publication"]
    assert small.evaluator.certain == (PARAMETERS - NORMS) * 5 / 8 + 4 * NORMS + adapter


@pytest.mark.parametrize(("bound", "completions", "prompts"), [(0, 16, 2), (5 * 768 + 700, 5, 2), (10, 1, 1)])
def test_a_limit_on_cached_tokens_limits_the_cache(bound, completions, prompts):
    # 2 · 4 layers · 128 numbers of 4 bytes for each of 512 + 256 tokens of a completion, and for those of the prompts
    # before they are copied; 2 groups of 8 without a bound.
    cache = plan("batch_groups=2", f"max_kv_tokens={bound}").worker.at_times["KV cache"]
    assert cache == (completions * 768 + prompts * 512) * 2 * 4 * 128 * 4


@pytest.mark.parametrize("kv_bits", [0, 4])
def test_the_evaluators_cache_has_a_row_for_each_answer_and_is_never_packed(kv_bits):
    sizes = ("eval_batch_size=8", "eval_subset_size=0", "max_prompt_length=100", "eval_max_new_tokens=100")
    cache = plan(*sizes, f"kv_bits={kv_bits}").evaluator.at_times["KV cache"]
    # As above, for 256 columns of a row and 100 tokens of its prompt.
    assert cache == 8 * (256 + 100) * 2 * 4 * 128 * 4


def test_without_workers_the_learner_also_samples():
    alone, with_worker = plan("workers=0").learner.at_times, plan("workers=1").learner.at_times
    assert alone["KV cache"] > 0
    assert "KV cache" not in with_worker


def test_a_smaller_micro_batch_and_recomputation_need_less():
    whole = plan("batch_size=4").learner.at_times["activations"]
    assert plan("batch_size=1").learner.at_times["activations"] < whole / 2
    assert plan("batch_size=4", "gradient_checkpointing=true").learner.at_times["activations"] < whole


def changed_model(tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return folder


def test_a_model_of_several_parts_is_planned_by_its_part_about_text(tmp_path):
    nested = changed_model(tmp_path, lambda config: {"model_type": "gemma3", "text_config": config})
    assert plan(folder=nested).worker.at_times == plan().worker.at_times
    assert plan(folder=nested).is_whole


@pytest.mark.parametrize("change", [lambda _: {"n_embd": 4}, lambda c: c | {"intermediate_size": [1, 2]}])
def test_a_config_json_that_does_not_tell_the_widths_gives_a_plan_that_limits_nothing(tmp_path, change):
    folder = changed_model(tmp_path, change)
    assert not plan(folder=folder).is_whole
    config = load_config(None, ["task=arithmetic", f"model_name={folder}"]).config
    environment = Shares(config, allocate(config, CUDA)).learner()
    assert environment["GRPO_ACTORS_MEMORY_LIMIT"] == "0"
    assert environment["GRPO_ACTORS_CACHE_LIMIT"] == "0"


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_config_json_that_is_none_is_one_error(tmp_path, content):
    folder = changed_model(tmp_path, lambda config: config)
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        plan(folder=folder)


def qwen(folder, name):
    """Write config.json and the names and shapes of a model's weights, in bfloat16, without the weights."""
    (folder / "config.json").write_text(json.dumps(config_json(name, "bfloat16")))
    arrays = tree_flatten(build(config_json(name, "bfloat16")).parameters())
    header = {key: {"dtype": "BF16", "shape": array.shape, "data_offsets": [0, 0]} for key, array in arrays}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


@pytest.mark.parametrize(
    ("model", "ranks", "card_gb", "parameters"),
    [("qwen2.5-7b", 4, 80, 7_615_616_512), ("qwen2.5-1.5b", 2, 24, 1_543_714_304)],
)
def test_ranks_divide_float32_weights_and_state_and_each_has_the_whole_gradient(
    tmp_path, model, ranks, card_gb, parameters
):
    settings = ("dtype=bfloat16", "kl_coeff=0", "gradient_checkpointing=true", "batch_size=1")
    sizes = ("num_generations=8", "max_prompt_length=512", "max_new_tokens=512")
    folder, machine = qwen(tmp_path, model), cuda(*[card_gb * GB] * ranks)
    alone, shared = (
        plan(*settings, *sizes, f"ranks={count}", folder=folder, machine=machine) for count in (1, ranks)
    )
    assert alone.parameters == parameters
    # A gradient of 4 bytes; float32 weights of 4 and two means of 8, divided: whole arrays, even to one in a thousand.
    assert alone.learner.held["training"] == (4 + 12) * parameters
    even = (4 + 12 / ranks) * parameters
    assert even <= shared.learner.held["training"] <= 1.001 * even
    # The weights' 2 bytes too. One process alone would not hold this state: 137 of 80 GB, 27.8 of 24 GB.
    assert shared.learner.certain < card_gb * GB < alone.learner.held["training"] + 2 * parameters
    # The upper bound of all that may exist at once is above the card still: a new gradient of 6 bytes comes on top.
    assert shared.learner.at_times["activations"] > 6 * parameters
    assert card_gb * GB < shared.learner.total < 2.3 * card_gb * GB
    # Rank 0 copies all of it to the host.
    assert shared.snapshot == alone.snapshot
    # With a gradient of its own part only, no new one is whole either.
    own = plan(*settings, *sizes, f"ranks={ranks}", "divide_gradient=true", folder=folder, machine=machine)
    assert 16 / ranks * parameters <= own.learner.held["training"] <= 1.001 * 16 / ranks * parameters
    assert own.learner.at_times["activations"] < shared.learner.at_times["activations"] - 3 * parameters


def test_each_rank_of_a_divided_model_holds_its_part_of_the_layers_matrices():
    worker, alone = plan("rollout_ranks=2").worker, plan().worker
    # float32: half of the matrices, and all of the embedding and the norms.
    assert alone.held["weights"] - worker.held["weights"] == 4 * MATRICES_IN_LAYERS / 2
    assert worker.at_times["KV cache"] == alone.at_times["KV cache"] / 2
    lora = ("fine_tune_type=lora", "ranks=2")
    divided, whole = plan(*lora, "divide_model=true").learner, plan(*lora).learner
    assert whole.held["weights"] - divided.held["weights"] == 4 * MATRICES_IN_LAYERS / 2
    assert divided.held["training"] == whole.held["training"]
    assert divided.at_times["activations"] < whole.at_times["activations"]


def test_a_head_count_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"^rollout.rollout_ranks: must divide the 4 heads of tiny, got 3$"):
        plan("rollout_ranks=3")
    with pytest.raises(
        ConfigError, match=r"^learner.ranks with divide_model: must divide the 4 heads of tiny, got 3$"
    ):
        plan("ranks=3", "divide_model=true", "fine_tune_type=lora")
