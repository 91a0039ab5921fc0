import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.objective.kl import KL_ESTIMATORS, token_kl


def kl_and_slope(name, logprob, reference):
    def total(x):
        return token_kl(name, x, mx.array([[reference]])).sum()

    value, slope = mx.value_and_grad(total)(mx.array([[logprob]]))
    return value.item(), slope.item()


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    # x = log π_ref − log π = 0.5; d/dlog π = −d/dx.
    [("k1", -0.5, 1.0), ("k2", 0.125, -0.5), ("k3", np.exp(0.5) - 1.5, 1 - np.exp(0.5))],
)
def test_estimates_and_slopes_by_hand(name, value, slope):
    assert kl_and_slope(name, -1.0, -0.5) == pytest.approx((value, slope), rel=1e-6)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_a_policy_that_is_its_reference_has_no_kl(name):
    assert kl_and_slope(name, -1.3, -1.3)[0] == 0.0


def test_k3_keeps_its_digits_near_zero():
    # k3 = x²/2 + x³/6 + …: at x = 1e-3, 5.001667e-7; e^x − x − 1 in float32 would be off by a tenth.
    x = np.float32(-1.0) - np.float32(-1.001)
    assert kl_and_slope("k3", -1.001, -1.0)[0] == pytest.approx(x**2 / 2 + x**3 / 6, rel=2e-3)


def test_a_reference_that_finds_a_token_impossible_does_not_overflow():
    for name in KL_ESTIMATORS:
        assert np.isfinite(kl_and_slope(name, -1.0, -1e30)).all()
        assert np.isfinite(kl_and_slope(name, -1e30, -1.0)).all()


def test_k1_and_k3_estimate_the_divergence_without_bias():
    # Exact, by summing over a vocabulary of 4: KL = Σ π log(π / π_ref) = Σ π · estimate.
    p, q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    for name in ("k1", "k3"):
        estimates = np.array(token_kl(name, mx.array(np.log(p)[None]), mx.array(np.log(q)[None])))[0]
        assert (p * estimates).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
