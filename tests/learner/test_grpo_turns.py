"""An update on completions with environment tokens: the gradient comes from the sampled tokens alone."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hand_made import MAX_NEW, REWARDS, config, groups_of, learner
from mlx import nn
from mlx.utils import tree_flatten

from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import load_policy

#: Bounds of the environment spans in every completion that is long enough.
INSERTED = [3, 6, 8, 10]


def with_turns(groups):
    """Return the groups with some tokens of each completion marked as inserted; their log-probs are nonsense."""
    return [
        replace(group, completions=[_with_turns(completion) for completion in group.completions])
        for group in groups
    ]


def _with_turns(completion):
    bounds = INSERTED if len(completion.tokens) > INSERTED[-1] else []
    # A closing tag is masked as an environment's tokens are.
    marked = replace(completion, inserted=bounds[:2], forced=bounds[2:])
    logprobs = [p if s else -77.0 for p, s in zip(marked.logprobs, marked.sampled, strict=True)]
    return replace(marked, logprobs=logprobs)


def gradient_by_hand(policy, groups, aggregation):
    """Return value and gradient of Σ weight · (−A log π) over the sampled tokens: GRPO's loss on-policy."""
    R = np.array(REWARDS)
    A = (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    lengths = np.array([[sum(c.sampled) for c in group.completions] for group in groups])
    weight = {
        "grpo": 1 / (lengths * lengths.size),
        "dapo": np.full(lengths.shape, 1 / lengths.sum()),
        "dr_grpo": np.full(lengths.shape, 1 / (lengths.size * MAX_NEW)),
    }[aggregation]

    def loss(model):
        total = mx.array(0.0)
        for i, group in enumerate(groups):
            for k, c in enumerate(group.completions):
                text, start = mx.array([[*group.prompt, *c.tokens]]), mx.array([len(group.prompt) - 1])
                logprobs, _ = completion_logprobs(model, text, start, mx.array([c.tokens]), 1.0)
                where = [at for at, sampled in enumerate(c.sampled) if sampled]
                total = total - float(weight[i, k] * A[i, k]) * logprobs[0, mx.array(where)].sum()
        return total

    value, gradients = nn.value_and_grad(policy.model, loss)(policy.model)
    return value.item(), dict(tree_flatten(gradients))


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_the_gradient_is_the_one_computed_by_hand_without_the_inserted_tokens(aggregation):
    # adam_beta1 = 0: the first moment is the gradient itself.
    grpo = learner(config(aggregation=aggregation, adam_beta1=0.0))
    groups = with_turns(groups_of(grpo.policy))
    assert sum(bool(c.inserted) for group in groups for c in group.completions) >= 8
    _, expected = gradient_by_hand(load_policy(grpo.config.model, seed=0), groups, aggregation)
    metrics = grpo.update(groups)
    state = dict(tree_flatten(grpo.training.optimizer.state))
    norm = np.sqrt(sum(float((gradient**2).sum()) for gradient in expected.values()))
    assert norm > 1e-2
    for name, gradient in expected.items():
        np.testing.assert_allclose(np.array(state[f"{name}.m"]), np.array(gradient), atol=2e-5 * norm)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["logprob_gap_max"] < 1e-4, "the log-probs of inserted tokens are never read"
    assert metrics["tokens"] == sum(sum(c.sampled) for group in groups for c in group.completions)


@pytest.mark.parametrize(
    "objective",
    [
        {"kl_coeff": 0.1, "entropy_coeff": 0.01, "top_entropy_share": 0.5},
        {"algorithm": "gspo"},
        {"ratio": "recomputed", "correction": "sequence_truncate"},
        {"overlong_tokens": 8, "mask_truncated": True},
    ],
)
def test_log_probs_of_inserted_tokens_reach_no_weight_and_no_metric(objective):
    """With other log-probs for them the update is the same to the last bit, under every objective."""
    metrics, weights = [], []
    for nonsense in (0.0, -77.0):
        grpo = learner(config(**objective))
        groups = with_turns(groups_of(load_policy(grpo.config.model, seed=0)))
        for group in groups:
            for c in group.completions:
                c.logprobs[:] = [p if s else nonsense for p, s in zip(c.logprobs, c.sampled, strict=True)]
        metrics.append(grpo.update(groups))
        weights.append({name: np.array(array) for name, array in grpo.policy.trainable().items()})
    timed = ("learner_tokens_per_s", "memory_gb")
    assert {k: v for k, v in metrics[0].items() if k not in timed} == {
        k: v for k, v in metrics[1].items() if k not in timed
    }
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])


def test_the_mean_number_of_turns_is_reported():
    grpo = learner(config())
    groups = with_turns(groups_of(grpo.policy))
    turns = [2 if c.inserted else 1 for group in groups for c in group.completions]
    assert grpo.update(groups)["turns_mean"] == pytest.approx(np.mean(turns))
