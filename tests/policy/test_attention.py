"""The kernel in the place of MLX's attention, and the other ways in which a GPU computes the same."""

from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx_lm.models import base

from grpo_actors.policy import attention
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
@pytest.mark.parametrize("size", attention.HEAD_SIZES)
def test_the_kernel_is_softmax_attention_over_each_rows_own_columns(size, heads):
    rows, columns, stop = 5, 70, 61
    keys = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((rows, heads[0], 1, size), key=keys[0])
    k, v = (mx.random.normal((rows, heads[1], columns, size), key=key) for key in keys[1:])
    starts = mx.array([0, 3, 17, 59, 60])
    out = attention.attend_rows(q, k, v, starts=starts, stop=mx.array([stop]), scale=size**-0.5)
    seen = (mx.arange(columns) >= starts[:, None]) & (mx.arange(columns) < stop)
    expected = base.scaled_dot_product_attention(q, k, v, None, size**-0.5, seen[:, None, None])
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=2e-3)  # TF32 products in MLX's


@cuda_alone
def test_a_compiled_step_draws_the_tokens_of_a_masked_one(tiny):
    prompts = [tiny.encode_chat([{"role": "user", "content": text}]) for text in ("7", "What is 12 + 34?")]
    seeds = [[1, 2, 3], [4, 5]]
    ways = [SamplingParams(30, compiled=compiled) for compiled in (True, False)]
    compiled, masked = (sample_groups(tiny, prompts, seeds, params) for params in ways)
    assert tiny.compiled_steps
    for one, other in zip(chain(*compiled), chain(*masked), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-2)
