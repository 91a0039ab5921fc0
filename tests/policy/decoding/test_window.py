"""Rows that come and go over sliding windows and quantised caches, against mlx-lm's cache of a single prompt."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from grpo_actors.errors import ConfigError
from grpo_actors.policy.decoding import window
from grpo_actors.policy.decoding.batching import Sampler
from grpo_actors.policy.decoding.sampling import SamplingParams
from grpo_actors.policy.decoding.step import fits, require_cache_bits
from grpo_actors.policy.decoding.window import Prompts, Ring, Window, group_size

#: Lengths below, at and above a window of 8; the longest comes late, when the columns are in use.
LENGTHS = (5, 1, 8, 9, 40, 23)
PROMPTS = [[(5 * i + 1) * i % 29 + 1 for i in range(length)] for length in LENGTHS]
TOKENS = 14


def refilled(policy, *, kv_bits=0):
    """Sample one completion of each prompt in a batch of three rows, which are used again at once."""
    sampler = Sampler(policy, SamplingParams(TOKENS, kv_bits=kv_bits), max_rows=3)
    for key, prompt in enumerate(PROMPTS):
        sampler.submit(key, prompt, [key])
    done = {}
    while not sampler.idle:
        done.update(sampler.step()[1])
    return [done[key][0] for key in range(len(PROMPTS))]


def logprobs_alone(model, prompt, tokens, *, kv_bits=0):
    """Return the log-probs of a completion that mlx-lm decodes token by token, with a cache of `kv_bits` after the prompt."""
    cache, logprobs = make_prompt_cache(model), []
    if prompt[:-1]:
        model(mx.array([prompt[:-1]]), cache=cache)
    if kv_bits:
        cache = [layer.to_quantized(group_size=32, bits=kv_bits) for layer in cache]
    for fed, token in zip([prompt[-1], *tokens], tokens, strict=False):
        logits = model(mx.array([[fed]]), cache=cache)[0, -1]
        logprobs.append((logits[token] - mx.logsumexp(logits)).item())
    return logprobs


@pytest.mark.parametrize(
    ("family", "size", "growth"),
    [
        *(("gemma3_text", 2, 64), ("gemma3_text", 8, 2), ("gemma3_text", 8, 64), ("gemma3_text", 512, 2)),
        *(("gpt_oss", 8, 64), ("gemma3n", 8, 64)),
    ],
)
def test_rows_used_again_over_a_sliding_window_decode_as_mlx_lm_does_each_prompt(
    family, size, growth, monkeypatch
):
    monkeypatch.setattr(window, "GROWTH", growth)
    policy = random_policy(family, sliding_window=size)
    assert fits(policy)
    assert any(type(cache) is RotatingKVCache for cache in make_prompt_cache(policy.model))
    for prompt, sample in zip(PROMPTS, refilled(policy), strict=True):
        expected = logprobs_alone(policy.model, prompt, sample.tokens)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_a_quantised_cache_samples_as_mlx_lms_does_and_not_as_an_unquantised_one(kv_bits):
    # Heads of 32 numbers: one group.
    policy = random_policy("qwen2", hidden_size=128, num_attention_heads=4, head_dim=32)
    errors, gaps = [], []
    for prompt, sample in zip(PROMPTS, refilled(policy, kv_bits=kv_bits), strict=True):
        for bits, differences in ((kv_bits, errors), (0, gaps)):
            expected = logprobs_alone(policy.model, prompt, sample.tokens, kv_bits=bits)
            differences.append(np.abs(np.array(sample.logprobs) - expected))
    # A key between two of the 2^bits levels may be rounded to either, so single tokens differ by more than 1e-5.
    errors, gaps = np.concatenate(errors), np.concatenate(gaps)
    assert np.median(errors) < 1e-5
    assert errors.mean() < gaps.mean() / 20


def test_over_a_sliding_window_8_bits_are_nearer_to_an_unquantised_cache_than_4():
    policy = random_policy("gemma3_text", head_dim=64, sliding_window=8)
    gaps = {}
    for kv_bits in (8, 4):
        differences = [
            np.abs(np.array(sample.logprobs) - logprobs_alone(policy.model, prompt, sample.tokens))
            for prompt, sample in zip(PROMPTS, refilled(policy, kv_bits=kv_bits), strict=True)
        ]
        gaps[kv_bits] = np.mean(np.concatenate(differences))
    # There are 255 steps between the levels of 8 bits, and 15 between those of 4.
    assert 0 < 5 * gaps[8] < gaps[4]


def test_a_quantised_cache_takes_fewer_bytes():
    model = random_policy("qwen2", hidden_size=128, num_attention_heads=4, head_dim=32).model
    rows = np.arange(1)

    def held(kv_bits):
        cache = Window(model, 1, kv_bits)
        cache.place(rows, Prompts(model, [[1] * 10]), rows)
        return sum(array.nbytes for layer in cache.layers for array in layer.arrays)

    # 32 numbers of 32 bits; or of 8, or 4, and a scale and an offset of 32 bits.
    assert (held(8) / held(0), held(4) / held(0)) == (320 / 1024, 192 / 1024)


@pytest.mark.parametrize(
    ("family", "reason"), [("mamba", "cache something else"), ("qwen2", "a width of 8 in a head")]
)
def test_a_model_whose_cache_cannot_be_quantised_is_refused_with_the_setting(family, reason):
    policy = random_policy(family)
    require_cache_bits(policy, 0, "rollout.kv_bits")
    with pytest.raises(ConfigError, match=rf"^rollout\.kv_bits: must be 0 for .*{reason}"):
        require_cache_bits(policy, 8, "rollout.kv_bits")


def test_a_layer_with_a_sliding_window_keeps_no_more_columns_than_it_sees():
    model = random_policy("gemma3_text", sliding_window=8).model
    cache = Window(model, 2)
    prompts = [[1] * 200, [2] * 3]
    rows = np.arange(2)
    cache.place(rows, Prompts(model, prompts), rows)
    held = sorted({array.shape[2] for layer in cache.layers for array in layer.arrays})
    # 199 tokens before the one that is fed next: the next multiple of 64 is 256.
    assert held == [8, 256]


def test_columns_that_only_a_long_row_needed_are_dropped_after_it():
    model = random_policy("qwen2").model
    cache, rows = Window(model, 2), np.arange(2)
    cache.place(rows, Prompts(model, [[1] * 200, [2] * 64]), rows)
    cache.free(0)
    cache.reserve()  # 63 tokens before the one that is fed next are 64
    assert {array.shape[2] for layer in cache.layers for array in layer.arrays} == {64}


@pytest.mark.parametrize(
    ("width", "size"), [(0, None), (8, None), (32, 32), (64, 64), (96, 32), (128, 64), (160, 32)]
)
def test_as_many_numbers_of_a_head_share_a_scale_as_divide_its_width(width, size):
    assert group_size(width) == size


@pytest.mark.parametrize(
    ("bound", "columns"),
    # Columns come 64 at a time, and go once there are more than twice as many as are needed.
    [(None, [64, 64, 128, 128, 192, 64]), (100, [64, 64, 100, 100, 100, 100])],
)
def test_a_ring_grows_in_steps_up_to_its_bound_and_shrinks_when_most_of_it_is_too_old(bound, columns):
    ring, found = Ring(bound), []
    for tokens in (1, 64, 65, 64, 129, 64):
        ring.fit(tokens, [])
        found.append(ring.columns)
        ring.next = 0
    assert found == columns


@pytest.mark.parametrize(
    ("prompts", "longest", "shape"), [(1, 65, (1, 64)), (2, 66, (2, 128)), (3, 2, (4, 64))]
)
def test_prompts_padded_to_few_shapes_have_the_same_keys_and_values(prompts, longest, shape):
    model = random_policy("qwen2").model
    given = [[(3 * i + j) % 29 + 1 for j in range(longest - i % 2)] for i in range(prompts)]
    few, plain = Prompts(model, given, few_shapes=True), Prompts(model, given)
    assert few.width == plain.width == longest - 1
    for one, other in zip(few.layers, plain.layers, strict=True):
        for padded, array in zip(one, other, strict=True):
            assert (padded.shape[0], padded.shape[2]) == shape
            for row, length in enumerate(few.lengths):
                np.testing.assert_allclose(padded[row, :, :length], array[row, :, :length], atol=1e-5)
