"""The kernel that replaces MLX's attention, and the other ways in which a GPU computes the same."""

from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx_lm.models import base
from spelled_out import attend_joined

from grpo_actors.policy.attention import Callers
from grpo_actors.policy.decoding import draw_kernel, slot_kernels
from grpo_actors.policy.decoding.draw import draw
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.logprobs import _fused, _shared_exponential

pytestmark = pytest.mark.gpu
cuda_only = pytest.mark.skipif(not mx.cuda.is_available(), reason="the kernel is for CUDA")


def test_every_layer_of_a_model_is_found_to_call_mlx_lms_attention(tiny):
    assert Callers(tiny.model).sizes(tiny.model) == [(4, 32, 32)] * 4
    # qwen3_moe calls it from another module than its layers' names suggest; lfm2's convolutions do not call it.
    experts = random_policy("qwen3_moe").model
    assert len(Callers(experts).sizes(experts)) == len(experts.layers)
    convolutions = random_policy("lfm2").model
    assert len(Callers(convolutions).sizes(convolutions)) < len(convolutions.layers)


def test_the_attention_that_layers_call_is_replaced_and_restored_even_after_an_error(tiny):
    before = np.array(tiny.model(mx.array([[1, 2, 3]])))
    callers = Callers(tiny.model)

    def nothing(queries, *_args, **_kwargs):
        return mx.zeros_like(queries)

    def raises(*_args, **_kwargs):
        raise ZeroDivisionError

    with callers.calling(nothing):
        assert np.abs(np.array(tiny.model(mx.array([[1, 2, 3]]))) - before).max() > 0.1
    with pytest.raises(ZeroDivisionError), callers.calling(raises):
        tiny.model(mx.array([[1, 2, 3]]))
    assert np.array_equal(np.array(tiny.model(mx.array([[1, 2, 3]]))), before)


def test_log_probs_and_entropies_by_mlxs_kernel_are_those_of_the_formula():
    logits = 4 * mx.random.normal((15, 40), key=mx.random.key(1))
    targets = mx.array(np.random.default_rng(2).integers(0, 40, 15))

    def both(function):
        def mixed(x):
            logprobs, entropies = function(x, targets)
            return (logprobs - 0.3 * entropies).sum()

        return *function(logits, targets), mx.grad(mixed)(logits)

    for a, b in zip(both(_fused), both(_shared_exponential), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5)


def numbers(array):
    return np.array(array.astype(mx.float32))


def drawn(*shape):
    """Return one random float32 array for each shape."""
    keys = mx.random.split(mx.random.key(0), len(shape))
    return [mx.random.normal(one, key=key) for one, key in zip(shape, keys, strict=True)]


#: Error of a result near 1. The tensor cores take queries and weights of 8 bits (bfloat16) or 11 (float16).
TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 2e-2, mx.float16: 3e-3}


@cuda_only
@pytest.mark.parametrize("heads", [(8, 8), (14, 2), (30, 2)])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, mx.float32) for size in slot_kernels.HEAD_SIZES),
        *((size, dtype) for size in (64, 96, 128) for dtype in (mx.bfloat16, mx.float16)),
    ],
)
def test_the_kernel_is_softmax_attention_over_each_rows_own_tokens_and_writes_the_new_one(size, dtype, heads):
    rows, columns, layer = 6, 300, 1
    new = [(rows, heads[1], 1, size)] * 2
    given = drawn((rows, heads[0], 1, size), *new, (3, 2, rows, heads[1], columns, size))
    q, k, v, cache = (array.astype(dtype) for array in given)
    lengths = mx.array([0, 3, 15, 16, 298, 299])
    is_new = (mx.arange(columns) == lengths[:, None])[:, None, :, None]
    held = [mx.where(is_new, one, cache[layer, which]) for which, one in enumerate((k, v))]
    expected_cache = numbers(cache)
    expected_cache[layer] = np.stack([numbers(array) for array in held])
    seen = (mx.arange(columns) <= lengths[:, None])[:, None, None]
    q_and_held = [array.astype(mx.float32) for array in (q, *held)]
    expected = base.scaled_dot_product_attention(*q_and_held, None, size**-0.5, seen)
    mx.eval(expected)
    out = slot_kernels.attend_rows(q, k, v, slot_kernels.Past(cache, layer, lengths), size**-0.5)
    np.testing.assert_allclose(numbers(out), numbers(expected), atol=TOLERANCE[dtype])
    assert np.array_equal(numbers(cache), expected_cache)


@cuda_only
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize(
    ("size", "heads", "dtype"),
    [
        *((size, heads, mx.float32) for size, heads in ((64, (14, 2)), (96, (3, 3)), (128, (16, 8)))),
        *((size, heads, mx.bfloat16) for size, heads in ((64, (14, 2)), (128, (16, 8)))),
    ],
)
def test_the_kernel_divides_normalises_and_rotates_what_one_product_has_made(
    size, heads, dtype, rows, normed
):
    columns, layer = 40, 1
    of_layer = (2, 2, rows, heads[1], columns, size)
    given = drawn((rows, (heads[0] + 2 * heads[1]) * size), of_layer, (size,), (size,))
    joined, cache, *norms = (array.astype(dtype) for array in given)
    angles = mx.random.uniform(0, 6, (rows, size // 2), key=mx.random.key(1))
    rotation = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
    lengths = mx.arange(rows) * 39 // (rows - 1)  # 0 to 39
    shape = slot_kernels.Heads(*heads, size, size**-0.5, 1e-5)
    others = mx.array(numbers(cache))
    mx.eval(joined, cache, norms, rotation, others)
    floats = [norm.astype(mx.float32) for norm in norms]
    past = slot_kernels.Past(cache, layer, lengths)
    out = slot_kernels.attend_joined(joined, past, shape, rotation, tuple(norms) if normed else None)
    expected = attend_joined(
        joined.astype(mx.float32),
        slot_kernels.Past(others, layer, lengths),
        *(shape, rotation, tuple(floats) if normed else None),
    )
    np.testing.assert_allclose(numbers(out), numbers(expected), atol=TOLERANCE[dtype])
    np.testing.assert_allclose(numbers(cache), numbers(others), atol=TOLERANCE[dtype])


@cuda_only
def test_prompts_are_copied_into_the_first_columns_of_their_rows_only():
    heads, size, width = 3, 64, 7
    prompts, cache = drawn((2, 2, 2, heads, 11, size), (2, 2, 5, heads, 20, size))
    expected = np.array(cache)
    mx.eval(prompts, cache)
    rows, chosen = [4, 0, 2], [1, 0, 1]
    source, *target = [mx.array(which, mx.int32) for which in (chosen, rows, [width])]
    mx.eval(slot_kernels.place_prompts(prompts, source, cache, *target))
    expected[:, :, rows, :, :width] = np.array(prompts)[:, :, chosen, :, :width]
    assert np.array_equal(np.array(cache), expected)


@cuda_only
@pytest.mark.parametrize("vocabulary", [151_936, 49_155, 64])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_kernel_draws_what_is_drawn_step_by_step(vocabulary, dtype):
    [logits] = drawn((40, vocabulary))
    logits = (4 * logits).astype(dtype)
    logits[:, :3] = -mx.inf  # never drawn, not even at 0
    uniform = mx.concatenate(
        [mx.array([0.0, 1 - 2**-24]), mx.random.uniform(shape=(38,), key=mx.random.key(1))]
    )
    token, logprob = draw_kernel.draw(logits, uniform, 0.7)
    expected, expected_logprob = draw(logits, uniform, SamplingParams(1, temperature=0.7))
    # If a boundary of the cumulative sum is within rounding of the uniform, the neighbouring token may be drawn.
    assert (np.array(token) == np.array(expected)).mean() >= 0.95
    same = np.flatnonzero(np.array(token) == np.array(expected))
    np.testing.assert_allclose(np.array(logprob)[same], np.array(expected_logprob)[same], atol=1e-4)
    assert np.array(token).min() >= 3


@cuda_only
@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("max_kv_tokens", [0, 300])
def test_a_step_over_slots_draws_the_tokens_of_a_masked_one(tiny, compiled, max_kv_tokens, penalty):
    texts = ("7", "What is 12 + 34?", "Tom has 21 apples and buys 3 bags of 14 apples. How many has he now?")
    prompts = [tiny.chat.encode([{"role": "user", "content": text}]) for text in texts]
    seeds = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    params = SamplingParams(30, compiled=compiled, max_kv_tokens=max_kv_tokens, repetition_penalty=penalty)
    over_slots = sample_groups(tiny, prompts, seeds, params)
    found = findings(tiny)
    assert bool(found.compiled_steps) == (compiled and penalty == 1)
    assert found.fits_blocks
    found.fits_blocks = False
    by_layers = sample_groups(tiny, prompts, seeds, params)
    found.attention_callers = False  # as on a machine without the kernel
    masked = sample_groups(tiny, prompts, seeds, params)
    for one, other, third in zip(chain(*over_slots), chain(*by_layers), chain(*masked), strict=True):
        assert one.tokens == other.tokens == third.tokens
        np.testing.assert_allclose(one.logprobs, third.logprobs, atol=1e-4)
        np.testing.assert_allclose(other.logprobs, third.logprobs, atol=1e-4)
