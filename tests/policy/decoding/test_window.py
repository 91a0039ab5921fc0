"""Rows that come and go over sliding windows and quantised caches, against mlx-lm's cache of a single prompt."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from grpo_actors.policy.decoding import window
from grpo_actors.policy.decoding.batching import Sampler
from grpo_actors.policy.decoding.sampling import SamplingParams
from grpo_actors.policy.decoding.step import fits
from grpo_actors.policy.decoding.window import Prompts, Window

#: Lengths below, at and above a window of 8; the longest comes late, when the columns are in use.
LENGTHS = (5, 1, 8, 9, 3, 40, 2, 23)
PROMPTS = [[(5 * i + 1) * i % 29 + 1 for i in range(length)] for length in LENGTHS]
TOKENS = 20


def refilled(policy, *, rows=3):
    """Sample one completion of each prompt in a batch of `rows` rows, which are used again at once."""
    sampler = Sampler(policy, SamplingParams(TOKENS), rows)
    for key, prompt in enumerate(PROMPTS):
        sampler.submit(key, prompt, [key])
    done = {}
    while not sampler.idle:
        done.update(sampler.step()[1])
    return [done[key][0] for key in range(len(PROMPTS))]


def logprobs_alone(model, prompt, tokens):
    """Return the log-probs of a completion that mlx-lm decodes token by token."""
    cache, logprobs = make_prompt_cache(model), []
    if prompt[:-1]:
        model(mx.array([prompt[:-1]]), cache=cache)
    for fed, token in zip([prompt[-1], *tokens], tokens, strict=False):
        logits = model(mx.array([[fed]]), cache=cache)[0, -1]
        logprobs.append((logits[token] - mx.logsumexp(logits)).item())
    return logprobs


@pytest.mark.parametrize("growth", [2, 64])
@pytest.mark.parametrize(
    ("family", "size"),
    [("gemma3_text", 2), ("gemma3_text", 8), ("gemma3_text", 512), ("gpt_oss", 8), ("gemma3n", 8)],
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
    cache.place(rows, Prompts(model, [[1] * 200, [2] * 3]), rows)
    cache.free(0)
    cache.reserve()
    assert {array.shape[2] for layer in cache.layers for array in layer.arrays} == {64}
