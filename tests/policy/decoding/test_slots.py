"""The step over slots, with reference versions of the CUDA kernels: it gives what a masked window gives."""

from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from spelled_out import attend_joined, attend_rows, place_prompts

from grpo_actors.policy.decoding import attention, draw_kernel, slot_kernels, slots, step
from grpo_actors.policy.decoding.batching import Sampler
from grpo_actors.policy.decoding.blocks import Blocks
from grpo_actors.policy.decoding.draw import draw
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.sampling import SamplingParams
from grpo_actors.policy.decoding.slots import Slots
from grpo_actors.policy.decoding.window import Prompts

pytestmark = pytest.mark.skipif(mx.cuda.is_available(), reason="CUDA has the kernels themselves")

PROMPTS = [[5, 9, 3, 8, 2, 6, 4], [7], [2, 21, 9, 3] * 7]
SEEDS = [[1, 2, 3], [4], [5, 6, 7]]
#: Heads of 32 numbers, the fewest that a kernel supports.
HEADS_OF_32 = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that MLX's operations compute. The compiler is off: it would not see that they write into the cache."""
    monkeypatch.setattr(attention, "on_cuda", lambda: True)
    monkeypatch.setattr(slot_kernels, "attend_rows", attend_rows)
    monkeypatch.setattr(slots, "place_prompts", place_prompts)
    monkeypatch.setattr(
        *(draw_kernel, "draw"),
        lambda logits, uniform, temperature: draw(logits, uniform, SamplingParams(1, temperature)),
    )
    monkeypatch.setattr(Blocks.logits, "__defaults__", (attend_joined,))
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)


def sampled(policy, params, rows):
    """Sample all prompts in at most four rows; `rows`: the cache always has all four."""
    sampler, done, held = Sampler(policy, params, max_rows=4), {}, set()
    for key, (prompt, seeds) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        sampler.submit(key, prompt, seeds)
    while not sampler.idle:
        done.update(sampler.step()[1])
        held.add(len(sampler._window.lengths))
    sampler.close()
    assert (held - {0} == {4}) == rows  # none once nothing is left
    return list(chain(*(done[key] for key in range(3))))


@pytest.mark.parametrize(
    ("by_blocks", "compiled", "penalty"),
    [(True, True, 1.0), (True, False, 1.0), (False, True, 1.0), (True, True, 1.2)],
)
def test_a_step_over_slots_draws_the_tokens_of_a_masked_one_with_as_many_rows_at_each_step(
    tiny, kernels, by_blocks, compiled, penalty
):
    params, found = SamplingParams(20, compiled=compiled, repetition_penalty=penalty), findings(tiny)
    if not by_blocks:
        found.fits_blocks = False
    over_slots = sampled(tiny, params, rows=True)
    assert found.attention_callers
    assert found.fits_blocks is by_blocks
    assert bool(found.compiled_steps) == (compiled and penalty == 1)
    found.attention_callers = False  # as on a machine without the kernel
    for one, other in zip(over_slots, sampled(tiny, params, rows=False), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_blocks_that_give_other_logits_than_the_model_are_not_used(tiny, kernels, monkeypatch):
    def nothing(joined, past, heads, *_):
        return mx.zeros((len(joined), heads.queries * heads.size))

    monkeypatch.setattr(Blocks.logits, "__defaults__", (nothing,))
    for _ in range(2):
        assert step._blocks(tiny) is None
    assert findings(tiny).fits_blocks is False


def test_slots_have_room_for_a_prompt_a_completion_and_the_step_that_is_read_late(kernels):
    model, held = random_policy("qwen2").model, Slots(3, max_new_tokens=20)
    one = np.zeros(1, np.int32)

    def place(row, tokens):
        held.place(np.array([row], np.int32), Prompts(model, [[1 + row] * tokens]), one)
        return held.cache.shape[4]

    # The last token of a prompt is fed: 235 before it, 20 new ones and one more are 256.
    assert place(2, 236) == 256
    first = np.array(held.cache[:, :, 2, :, :235])
    assert first.any()
    assert place(0, 237) == 512
    assert place(1, 6) == 512
    assert np.array_equal(np.array(held.cache[:, :, 2, :, :235]), first)
    assert held.changed
    assert held.drawn.shape == (6,)
    held.advance()
    assert held.lengths.tolist() == [237, 6, 236]
    held.free(2)
    held.advance()
    assert held.lengths.tolist() == [238, 7, 0]
    assert held.live.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("family", "settings", "fits"),
    [
        ("qwen2", HEADS_OF_32, True),
        ("qwen2", {}, False),  # heads of 8
        ("gemma3_text", HEADS_OF_32, False),  # a sliding window
        # Heads of 32 numbers have keys, and heads of 64 values.
        ("deepseek_v3", {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 64}, False),
    ],
)
def test_the_kernel_replaces_attention_over_all_positions_with_heads_that_it_supports(
    kernels, family, settings, fits
):
    model = random_policy(family, **settings).model
    assert bool(attention.callers(model)) is fits


def test_without_cuda_no_kernel_replaces_attention():
    assert attention.callers(random_policy("qwen2", **HEADS_OF_32).model) is False
