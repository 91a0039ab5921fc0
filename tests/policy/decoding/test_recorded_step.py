"""A recorded step against the same step of MLX's own graph, in half precision on CUDA."""

import contextlib
from itertools import chain, takewhile

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx.utils import tree_flatten

from grpo_actors.policy.decoding import draw_kernel, recorded_step
from grpo_actors.policy.decoding.blocks import blocks_of
from grpo_actors.policy.decoding.draw import SamplingParams, draw
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.recorded_step import RecordedStep
from grpo_actors.policy.decoding.sampling import Sampler, sample_groups
from grpo_actors.policy.decoding.slots import Slots
from grpo_actors.policy.decoding.window import Prompts
from grpo_actors.policy.device import on_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not on_cuda(), reason="records on CUDA only")]

PROMPTS = [[3, 1, 2, 1, 3, 2, 1, 1, 2], [2, 1, 3], [5]]
#: Heads of 64 numbers, as most small models have.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def filled_slots(model):
    slots, rows = Slots(len(PROMPTS), max_new_tokens=20), np.arange(len(PROMPTS), dtype=np.int32)
    slots.place(rows, Prompts(model, PROMPTS), rows)
    return slots


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ],
)
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_a_recorded_step_gives_the_logits_of_mlxs_and_feeds_itself_what_it_drew(
    kind, settings, dtype, temperature
):
    model = random_policy(kind, **SIZES, **settings).model
    model.set_dtype(dtype)
    blocks, params = blocks_of(model), SamplingParams(20, temperature=temperature)
    arrays, rows = blocks.arrays(model), len(PROMPTS)
    assert recorded_step.fits(arrays, params)
    ours, mlxs = filled_slots(model), filled_slots(model)
    tokens = [prompt[-1] for prompt in PROMPTS]
    given = dict(enumerate(tokens))
    with contextlib.closing(RecordedStep(blocks, arrays, params)) as step:
        for turn in range(5):
            uniforms = np.random.default_rng(turn).random(rows, np.float32)
            drawn, logprobs = step.step(ours, uniforms, given).read()
            logits = blocks.logits(arrays, mx.array(tokens), mx.array(mlxs.lengths), mlxs.cache)
            mx.eval(logits)
            ours.advance()
            mlxs.advance()
            spread = float(mx.max(mx.abs(logits.astype(mx.float32))))
            tolerance = (0.03 if dtype == mx.bfloat16 else 0.005) * spread
            recorded = mx.array(step.logits)
            assert float(mx.max(mx.abs(recorded - logits))) <= tolerance, turn
            expected = (
                draw_kernel.draw(recorded, mx.array(uniforms), temperature)
                if temperature
                else draw(recorded, mx.array(uniforms), params, None)
            )
            assert drawn == np.array(expected[0]).tolist()
            np.testing.assert_allclose(logprobs, np.array(expected[1]), atol=1e-4)
            # From now on it feeds itself, except that the last row is given a token of ours.
            given, tokens = {2: 7}, [*drawn[:2], 7]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_completions_have_the_log_probs_that_mlxs_step_gives_them(temperature):
    policy = random_policy("qwen2", **SIZES)
    policy.model.set_dtype(mx.bfloat16)
    prompts, seeds = [list(range(2, n)) for n in (9, 40, 5)], [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    # Fewer rows than completions: rows are filled again while others are under way.
    params = SamplingParams(30, temperature=temperature, max_kv_tokens=5 * 70)
    recorded = sample_groups(policy, prompts, seeds, params)
    assert findings(policy).records
    assert recorded == sample_groups(policy, prompts, seeds, params)
    findings(policy).records = False
    plain = sample_groups(policy, prompts, seeds, params)
    # Until rounding makes two draws differ, which sends a completion another way.
    gaps = []
    for one, other in zip(chain(*recorded), chain(*plain), strict=True):
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.tokens, other.tokens, strict=False))
        )
        gaps += [abs(a - b) for a, b in zip(one.logprobs[:same], other.logprobs[:same], strict=True)]
    assert len(gaps) >= 3 * sum(map(len, seeds))
    assert np.mean(gaps) <= 0.03


def test_weights_that_change_between_two_steps_are_used_from_the_next_on():
    policy = random_policy("qwen2", **SIZES)
    policy.model.set_dtype(mx.bfloat16)
    params = SamplingParams(12, temperature=0.0)
    weights = dict(tree_flatten(policy.model.trainable_parameters()))

    def tokens_with(adopts_at):
        with contextlib.closing(Sampler(policy, params, max_rows=4)) as sampler:
            samples = sampler.submit(0, [3, 4, 5], [1, 2, 3, 4])
            for turn in range(14):
                if turn == adopts_at:
                    sampler.adopt(1, weights)
                sampler.step()
            return [sample.tokens for sample in samples], [sample.versions for sample in samples]

    plain, _ = tokens_with(None)
    adopted, versions = tokens_with(5)
    assert adopted == plain  # the same weights
    assert all(version == [0] * 5 + [1] * 7 for version in versions)
