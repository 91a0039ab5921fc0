"""Estimates of KL(π‖π_ref) at the tokens that were sampled, by Schulman's names k1, k2, k3.

Knows one log-ratio x = log π_ref − log π, [N, C]; refuses to know weights and sums. As loss terms they are
not what they are as estimates: k2's gradient is, in expectation, that of the true KL; k3's that of
KL(π_ref‖π); k1's is 0. Source: joschu.net/blog/kl-approx.html; k3 as a loss: DeepSeekMath, 2402.03300.
"""

from collections.abc import Callable

import mlx.core as mx

from grpo_actors.objective.ratio import LOG_RATIO_LIMIT


def k1(x: mx.array) -> mx.array:
    """−x: unbiased, of either sign; dk1/dlog π = 1 whatever the reference says."""
    return -x


def k2(x: mx.array) -> mx.array:
    """x² / 2: biased, never negative; dk2/dlog π = −x."""
    return 0.5 * mx.square(x)


def k3(x: mx.array) -> mx.array:
    """e^x − x − 1: unbiased and never negative; dk3/dlog π = 1 − e^x."""
    # expm1 keeps the digits that e^x − 1 loses near x = 0, where training starts.
    return mx.expm1(x) - x


KL_ESTIMATORS: dict[str, Callable[[mx.array], mx.array]] = {"k1": k1, "k2": k2, "k3": k3}


def token_kl(name: str, logprobs: mx.array, reference_logprobs: mx.array) -> mx.array:
    """KL of each token, [N, C], from log-probs of the sampled tokens, [N, C]; x is clamped to ±20.

    Args:
        name: A key of `KL_ESTIMATORS`.
        logprobs: log π, the one that is differentiated.
        reference_logprobs: log π_ref.
    """
    x = mx.stop_gradient(reference_logprobs) - logprobs
    return KL_ESTIMATORS[name](mx.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
