"""Compute weights that correct for the difference between the sampler and the learner's own old policy.

Depends on the log-probs of both, not on the loss that the weights multiply. A worker may sample with other kernels,
another dtype or quantised weights. Its policy μ then differs from π_old, though both are "the same" policy.
w ≈ π_old/μ corrects the expectation, and the cap bounds the variance. With the token mask, "recomputed" ratios are
the decoupled PPO of AReaL (2505.24298): proximal policy π_old, behaviour policy μ. The weights of tokens are TIS and
IcePop's mask. The weight of a sequence is the product over its tokens, as in TRL and verl; AReaL takes their
geometric mean.
"""

from collections.abc import Callable

import mlx.core as mx

from grpo_actors.objective.ratio import exp_clamped

# f(uncut w [N, C], C_min, C) -> w
Cut = Callable[[mx.array, float, float], mx.array]


def truncate(w: mx.array, floor: float, cap: float) -> mx.array:  # noqa: ARG001 - the table's signature
    """Return the smaller of w and C."""
    return mx.minimum(w, cap)


def reject(w: mx.array, floor: float, cap: float) -> mx.array:
    """Return w, but 0 outside [C_min, C]: a token that is too far off teaches nothing. The denominators stay."""
    return mx.where((w >= floor) & (w <= cap), w, 0.0)


#: Name -> (whether the weight is that of the whole completion, the function that handles weights out of bounds).
CORRECTIONS: dict[str, tuple[bool, Cut]] = {
    "token_truncate": (False, truncate),
    "token_mask": (False, reject),
    "sequence_truncate": (True, truncate),
    "sequence_mask": (True, reject),
}


def correction_weights(
    name: str,
    old_logprobs: mx.array,
    behaviour_logprobs: mx.array,
    mask: mx.array,
    *,
    floor: float,
    cap: float,
) -> tuple[mx.array, mx.array]:
    """Return the weight of each token, without gradient, and where it was cut.

    Args:
        name: A key of `CORRECTIONS`.
        old_logprobs: log π_old, [N, C], computed by the learner at the start of the update.
        behaviour_logprobs: log μ, [N, C], as recorded by the worker.
        mask: [N, C] bool.
        floor: C_min; only the two masks read it.
        cap: C.

    Returns:
        w [N, C], and [N, C] bool: where w is not the plain ratio. A sequence's weight is the product over
        its tokens, repeated for each token.
    """
    whole, cut = CORRECTIONS[name]
    log_weight = mx.where(mask, old_logprobs - behaviour_logprobs, 0.0)
    if whole:
        log_weight = mx.broadcast_to(log_weight.sum(axis=1, keepdims=True), log_weight.shape)
    plain = exp_clamped(log_weight)
    w = cut(plain, floor, cap)
    return mx.stop_gradient(w), (w != plain) & mask
