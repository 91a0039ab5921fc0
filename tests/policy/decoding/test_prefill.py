"""Many prompts run through the model in parts; no completion depends on it."""

import pytest

from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.prefill import PREFILL_TOKENS, prompts_at_once


# 2048 / 100 = 20.5: the power of two below it. Less than one prompt is one.
@pytest.mark.parametrize(
    ("longest", "prompts"), [(100, 16), (128, 16), (129, 8), (2048, 1), (5000, 1), (0, 2048)]
)
def test_the_prompts_that_run_at_once_hold_a_bounded_number_of_tokens(longest, prompts):
    assert prompts_at_once(longest) == prompts


def test_completions_of_prompts_that_run_in_parts_are_those_of_each_prompt_alone(tiny):
    prompts = [[(7 * i + j) % 300 + 3 for j in range(100 + i % 3)] for i in range(24)]
    assert sum(map(len, prompts)) > PREFILL_TOKENS
    params = SamplingParams(max_new_tokens=4)
    together = sample_groups(tiny, prompts, [[i] for i in range(24)], params)
    for i in (0, 15, 16, 23):
        [[alone]] = sample_groups(tiny, [prompts[i]], [[i]], params)
        assert together[i][0].tokens == alone.tokens
