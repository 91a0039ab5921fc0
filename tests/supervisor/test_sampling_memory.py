"""What a process that samples needs for its batch, in numbers that follow from widths and settings."""

import pytest

from grpo_actors.config import load_config
from grpo_actors.supervisor.model_files import Tensor, Widths
from grpo_actors.supervisor.sampling_memory import (
    Batch,
    cache_bytes,
    divided_bytes,
    evaluator_batch,
    joined_bytes,
    step_bytes,
    worker_batch,
)


def settings(*overrides):
    sizes = ("num_generations=4", "max_prompt_length=100", "max_new_tokens=50")
    return load_config(None, ["task=arithmetic", *sizes, *overrides]).config


@pytest.mark.parametrize(
    ("override", "batch"),
    [
        ("batch_groups=2", Batch(8, 2, 100, 50)),
        # A row holds 150 tokens: two have room in 449, and not in less than one row.
        ("max_kv_tokens=449", Batch(2, 1, 100, 50)),
        ("max_kv_tokens=450", Batch(3, 1, 100, 50)),
        ("max_kv_tokens=1", Batch(1, 1, 100, 50)),
        ("max_kv_tokens=100000", Batch(4, 1, 100, 50)),
        # A row of each of two groups, of four.
        ("batch_groups=4 max_kv_tokens=300", Batch(2, 2, 100, 50)),
    ],
)
def test_a_worker_decodes_its_groups_as_far_as_cached_tokens_are_allowed(override, batch):
    assert worker_batch(settings("batch_groups=1", *override.split())) == batch


@pytest.mark.parametrize(
    ("overrides", "batch"),
    [
        (("eval_subset_size=0",), Batch(8, 8, 100, 50)),
        (("eval_subset_size=5",), Batch(5, 5, 100, 50)),
        (("eval_subset_size=20", "eval_max_new_tokens=70"), Batch(8, 8, 100, 70)),
    ],
)
def test_the_evaluator_decodes_one_answer_of_each_problem(overrides, batch):
    assert evaluator_batch(settings("eval_batch_size=8", "eval_max_new_tokens=0", *overrides)) == batch


@pytest.mark.parametrize(("tokens", "columns"), [(255, 256), (256, 256), (257, 512)])
def test_a_cache_has_a_multiple_of_256_columns(tokens, columns):
    assert Batch(1, 1, 100, tokens - 100).columns == columns


def test_a_packed_cache_has_a_scale_and_an_offset_for_32_numbers_and_two_layers_unpacked():
    widths, batch = Widths(layers=5, keys_values=64), Batch(3, 2, 100, 50)
    # 3 rows of 256 columns, and two prompts of 100 tokens, which are never packed.
    assert cache_bytes(widths, batch, 2) == 64 * 5 * 2 * (3 * 256 + 2 * 100)
    row = 5 * (1 + 2 * 2 / 32) + 2 * 2
    assert cache_bytes(widths, batch, 2, 8) == 64 * (3 * 256 * row + 2 * 100 * 5 * 2)


# 8 arrays of the residual stream's 10 and 3 of the MLP's 20, of 2 bytes, in each of 3 layers.
@pytest.mark.parametrize(
    ("prompts", "prompt_tokens", "tokens"),
    # Prompts are computed together up to 2,048 tokens, and a longer one alone.
    [(3, 100, 300), (3, 1000, 2048), (3, 3000, 3000)],
)
def test_a_prefill_keeps_what_all_layers_compute(prompts, prompt_tokens, tokens):
    batch = Batch(6, prompts, prompt_tokens, 50)
    widths = Widths(layers=3, hidden=10, intermediate=20)
    assert step_bytes(widths, batch, 2) == tokens * (8 * 10 + 3 * 20) * 2 * 3


def test_a_step_of_many_rows_keeps_their_logits_and_five_float32_arrays_of_a_draw():
    widths = Widths(layers=1, hidden=1, vocabulary=1000)
    assert step_bytes(widths, Batch(6, 1, 1, 50), 2) == 6 * 1000 * (2 + 5 * 4)


def matrix(name, bits=0):
    return Tensor(f"model.layers.0.{name}.weight", (64, 64), bits)


#: Bytes of a matrix of 64 × 64 in bfloat16.
SIZE = 64 * 64 * 2


def test_ranks_divide_the_projections_of_the_layers_only():
    tensors = [
        matrix("self_attn.q_proj"),
        matrix("mlp.down_proj"),
        matrix("mlp.gate"),
        Tensor("q_proj.weight", (64, 64)),
    ]
    assert divided_bytes(tensors, 2, 0) == 4 * SIZE
    assert divided_bytes(tensors, 2, 0, ranks=4) == (2 / 4 + 2) * SIZE


def test_projections_of_one_input_are_copied_unless_one_is_quantised_or_they_are_too_large():
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    joined = [matrix(name) for name in names]
    others = [matrix("self_attn.o_proj"), matrix("mlp.down_proj")]
    assert joined_bytes([*joined, *others], 2, None) == 5 * SIZE
    # An eighth of a device may be copied.
    assert joined_bytes(joined, 2, 8 * 5 * SIZE) == 5 * SIZE
    assert joined_bytes(joined, 2, 8 * 5 * SIZE - 1) == 0
    assert joined_bytes([*joined, matrix("lm_head", bits=4)], 2, None) == 0
