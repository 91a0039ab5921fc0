"""The mean logit under the softmax and its gradient follow the formula, plain and compiled, on every back end."""

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.policy import mean_logit
from grpo_actors.policy.mean_logit import mean_logits

#: A vocabulary that no block divides.
LOGITS = mx.random.normal((15, 1037), key=mx.random.key(0)) * 3


def entropy_by_formula(logits: mx.array) -> mx.array:
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(mx.exp(logprobs) * logprobs).sum(axis=-1)


def entropy(logits: mx.array) -> mx.array:
    log_totals = mx.logsumexp(logits.astype(mx.float32), axis=-1)
    return log_totals - mean_logits(logits, log_totals)


@pytest.mark.parametrize(("compiled", "at_once"), [(False, 4), (False, 15), (True, 1024)])
def test_entropies_and_their_gradient_are_those_of_the_formula(compiled, at_once, monkeypatch):
    monkeypatch.setattr(mean_logit, "AT_ONCE", at_once)
    weights = mx.arange(15.0)

    def both(function):
        gradient = mx.value_and_grad(lambda logits: (weights * function(logits)).sum())
        return (mx.compile(gradient) if compiled else gradient)(LOGITS)

    (value, gradient), (expected_value, expected) = both(entropy), both(entropy_by_formula)
    np.testing.assert_allclose(value.item(), expected_value.item(), rtol=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(expected), rtol=1e-4, atol=1e-5)


def test_logits_in_half_precision_are_summed_in_float32():
    half = LOGITS.astype(mx.bfloat16)
    expected = entropy_by_formula(half.astype(mx.float32))
    np.testing.assert_allclose(np.array(entropy(half)), np.array(expected), rtol=1e-4)
