"""Compute the logarithm of a token's importance ratio: π over the policy that it is compared with (the anchor).

Depends on log-probs and masks, not on advantages. Each function returns [N, C], so that a loss has the same form
for the ratio of a token and of its sequence.
"""

from collections.abc import Callable

import mlx.core as mx

#: Bound of a log-ratio before exp: e^20 = 4.9e8, far beyond any use and safe to square in float32.
LOG_RATIO_LIMIT = 20.0


def exp_clamped(log_ratio: mx.array) -> mx.array:
    """Return exp of a log-ratio clamped to ±20; beyond the clamp the gradient is 0."""
    return mx.exp(mx.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def token_log_ratio(logprobs: mx.array, anchor: mx.array, mask: mx.array) -> mx.array:  # noqa: ARG001
    """Return each token's own log π − log π_old, [N, C]. PPO, 1707.06347."""
    return logprobs - anchor


def sequence_log_ratio(logprobs: mx.array, anchor: mx.array, mask: mx.array) -> mx.array:
    """Return the mean of a completion's token log-ratios, repeated to [N, C]. GSPO, 2507.18071, eq. 7.

    Its gradient reaches every token of the completion with weight 1 / length.
    """
    log_ratio = mx.where(mask, logprobs - anchor, 0.0)
    length = mx.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mx.broadcast_to(log_ratio.sum(axis=1, keepdims=True) / length, logprobs.shape)


def sequence_token_log_ratio(logprobs: mx.array, anchor: mx.array, mask: mx.array) -> mx.array:
    """Combine the value of the sequence's log-ratio with the gradient of the token's: sg[s] · π / sg[π].

    GSPO-token, eq. 14. With one advantage for the whole completion its gradient is that of GSPO.
    """
    sequence = sequence_log_ratio(logprobs, anchor, mask)
    return mx.stop_gradient(sequence) + (logprobs - mx.stop_gradient(logprobs))


LOG_RATIOS: dict[str, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "token": token_log_ratio,
    "sequence": sequence_log_ratio,
    "sequence_token": sequence_token_log_ratio,
}
