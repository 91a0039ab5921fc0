"""Estimate KL(π‖π_ref) at the sampled tokens, under Schulman's names k1, k2, k3.

Depends on one log-ratio x = log π_ref − log π, [N, C], not on weights and sums. A good estimate is not
automatically a good loss term. In expectation, the gradient of k2 is that of the true KL, the gradient of k3 is that
of KL(π_ref‖π), and the gradient of k1 is 0. Source: joschu.net/blog/kl-approx.html; k3 as a loss: DeepSeekMath,
2402.03300.
"""

from collections.abc import Callable

import mlx.core as mx

from grpo_actors.objective.ratio import LOG_RATIO_LIMIT


def k1(x: mx.array) -> mx.array:
    """Return −x: unbiased, of either sign; dk1/dlog π = 1 for every reference."""
    return -x


def k2(x: mx.array) -> mx.array:
    """Return x² / 2: biased, never negative; dk2/dlog π = −x."""
    return 0.5 * mx.square(x)


def k3(x: mx.array) -> mx.array:
    """Return e^x − x − 1: unbiased and never negative; dk3/dlog π = 1 − e^x."""
    # expm1 keeps the digits that e^x − 1 loses near x = 0, where training starts.
    return mx.expm1(x) - x


KL_ESTIMATORS: dict[str, Callable[[mx.array], mx.array]] = {"k1": k1, "k2": k2, "k3": k3}


def token_kl(name: str, logprobs: mx.array, reference_logprobs: mx.array) -> mx.array:
    """Return the KL of each token, [N, C], from log-probs of the sampled tokens, [N, C]; x is clamped to ±20.

    Args:
        name: A key of `KL_ESTIMATORS`.
        logprobs: log π; differentiated.
        reference_logprobs: log π_ref.
    """
    x = mx.stop_gradient(reference_logprobs) - logprobs
    return KL_ESTIMATORS[name](mx.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
