"""The kernel in the place of MLX's attention, and the other ways in which a GPU computes the same."""

from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx_lm.models import base

from grpo_actors.policy import attention, slot_kernels
from grpo_actors.policy.logprobs import _fused, _shared_exponential
from grpo_actors.policy.sampling import SamplingParams, sample_groups

cuda_alone = pytest.mark.skipif(not mx.cuda.is_available(), reason="the kernel is for CUDA")


def test_every_layer_of_a_model_is_found_to_call_mlx_lms_attention(tiny):
    assert attention.Callers(tiny.model).sizes(tiny.model) == [(32, 32)] * 4
    # Experts call it from another module than their layers' names suggest; lfm2's convolutions do not.
    experts = random_policy("qwen3_moe").model
    assert len(attention.Callers(experts).sizes(experts)) == len(experts.layers)
    convolutions = random_policy("lfm2").model
    assert len(attention.Callers(convolutions).sizes(convolutions)) < len(convolutions.layers)


def test_what_the_layers_call_is_replaced_and_put_back_after_an_error_too(tiny):
    before = np.array(tiny.model(mx.array([[1, 2, 3]])))
    callers = attention.Callers(tiny.model)

    def nothing(queries, *_args, **_kwargs):
        return mx.zeros_like(queries)

    def raises(*_args, **_kwargs):
        raise ZeroDivisionError

    with callers.calling(nothing):
        assert np.abs(np.array(tiny.model(mx.array([[1, 2, 3]]))) - before).max() > 0.1
    with pytest.raises(ZeroDivisionError), callers.calling(raises):
        tiny.model(mx.array([[1, 2, 3]]))
    assert np.array_equal(np.array(tiny.model(mx.array([[1, 2, 3]]))), before)


def test_log_probs_and_entropies_by_mlxs_kernel_are_those_spelled_out():
    logits = 4 * mx.random.normal((3, 5, 40), key=mx.random.key(1))
    targets = mx.array(np.random.default_rng(2).integers(0, 40, (3, 5)))

    def both(function):
        def mixed(x):
            logprobs, entropies = function(x, targets)
            return (logprobs - 0.3 * entropies).sum()

        return *function(logits, targets), mx.grad(mixed)(logits)

    for a, b in zip(both(_fused), both(_shared_exponential), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5)


@cuda_alone
@pytest.mark.parametrize("heads", [(8, 8), (14, 2)])
@pytest.mark.parametrize("size", slot_kernels.HEAD_SIZES)
def test_the_kernel_is_softmax_attention_over_each_rows_own_tokens_and_writes_the_new_one(size, heads):
    rows, columns = 5, 70
    keys = mx.random.split(mx.random.key(0), 5)
    q = mx.random.normal((rows, heads[0], 1, size), key=keys[0])
    new = [mx.random.normal((rows, heads[1], 1, size), key=key) for key in keys[1:3]]
    held = [mx.random.normal((rows, heads[1], columns, size), key=key) for key in keys[3:]]
    lengths = mx.array([0, 3, 17, 68, 69])
    place = (mx.arange(columns) == lengths[:, None])[:, None, :, None]
    expected_held = [mx.where(place, one, many) for one, many in zip(new, held, strict=True)]
    seen = (mx.arange(columns) <= lengths[:, None])[:, None, None]
    expected = base.scaled_dot_product_attention(q, *expected_held, None, size**-0.5, seen)
    mx.eval(expected, expected_held, q, new, held)
    out = slot_kernels.attend_rows(q, tuple(new), tuple(held), lengths, size**-0.5)
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=2e-3)  # TF32 products in MLX's
    for written, wanted in zip(held, expected_held, strict=True):
        assert np.array_equal(np.array(written), np.array(wanted))


@cuda_alone
def test_prompts_are_copied_into_the_first_columns_of_their_rows_alone():
    heads, columns, size, width = 3, 20, 64, 7
    draws = mx.random.split(mx.random.key(0), 4)
    prompts = tuple(mx.random.normal((2, heads, 11, size), key=key) for key in draws[:2])
    held = tuple(mx.random.normal((5, heads, columns, size), key=key) for key in draws[2:])
    before = [np.array(array) for array in held]
    mx.eval(prompts, held)
    rows, chosen = [4, 0, 2], [1, 0, 1]
    mx.eval(
        slot_kernels.place_prompts(
            prompts, mx.array(chosen, mx.int32), held, mx.array(rows, mx.int32), mx.array([width], mx.int32)
        )
    )
    for array, old, prompt in zip(held, before, prompts, strict=True):
        for row, which in zip(rows, chosen, strict=True):
            old[row, :, :width] = np.array(prompt)[which, :, :width]
        assert np.array_equal(np.array(array), old)


@cuda_alone
@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("max_kv_tokens", [0, 300])
def test_a_step_over_slots_draws_the_tokens_of_a_masked_one(tiny, compiled, max_kv_tokens, penalty):
    texts = ("7", "What is 12 + 34?", "Tom has 21 apples and buys 3 bags of 14 apples. How many has he now?")
    prompts = [tiny.encode_chat([{"role": "user", "content": text}]) for text in texts]
    seeds = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    params = SamplingParams(30, compiled=compiled, max_kv_tokens=max_kv_tokens, repetition_penalty=penalty)
    over_slots = sample_groups(tiny, prompts, seeds, params)
    assert bool(tiny.compiled_steps) == (compiled and penalty == 1)
    tiny.attention_callers = False  # as where there is no kernel
    masked = sample_groups(tiny, prompts, seeds, params)
    for one, other in zip(chain(*over_slots), chain(*masked), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-2)
