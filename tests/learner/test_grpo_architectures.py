"""An update of models with experts and with linear attention."""

from contextlib import nullcontext

import numpy as np
import pytest
from architectures import random_policy
from hand_made import config, learner

from grpo_actors.learner import grpo as grpo_module
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.model import prepare_training
from grpo_actors.tasks.task import Problem

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [5, 4]]
SEEDS = [[1, 2, 3, 4], [5, 6, 7, 8]]


def trained(family, **settings):
    """Train one update of a random model on its own completions; return its metrics and weights."""
    policy = random_policy(family)
    prepare_training(policy, 0)
    sampled = sample_groups(policy, PROMPTS, SEEDS, SamplingParams(24))
    groups = [
        SampledGroup(
            *(lease, 0, Problem("p", ({"role": "user", "content": "?"},), "1"), prompt, "w"),
            [
                SampledCompletion(s.tokens, s.logprobs, [0] * len(s.tokens), s.finished, {"hand": reward})
                for s, reward in zip(samples, (1.0, 0.0, 0.0, 2.0), strict=True)
            ],
        )
        for lease, (prompt, samples) in enumerate(zip(PROMPTS, sampled, strict=True))
    ]
    grpo = learner(config(**settings), policy)
    metrics = grpo.update(groups)
    return metrics, {name: np.array(array) for name, array in policy.trainable().items()}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_load_of_experts_is_reported(gradient_checkpointing):
    metrics, _ = trained("qwen3_moe", gradient_checkpointing=gradient_checkpointing)
    assert 1 < metrics["expert_load_max"] <= 2  # four experts, of which a token chooses two
    assert metrics["logprob_gap_max"] < 1e-4


def test_a_model_without_experts_has_no_load_of_them():
    metrics, _ = trained("qwen2")
    assert metrics["expert_load_max"] is None


def test_an_update_by_layers_for_whole_texts_is_that_of_mlx_lms_layers(monkeypatch):
    metrics, weights = trained("qwen3_5")
    assert metrics["logprob_gap_max"] < 1e-3  # the workers decode token by token
    monkeypatch.setattr(grpo_module, "for_whole_texts", lambda _: nullcontext())
    plain, by_tokens = trained("qwen3_5")
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    for name, array in by_tokens.items():
        # Adam divides by the size of the gradient: compare steps only where it is not rounding.
        assert np.abs(weights[name] - array).mean() < 1e-4, name
