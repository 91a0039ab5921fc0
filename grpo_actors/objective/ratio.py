"""The importance ratio of a token, in logarithms: π over the policy that it is measured against.

Knows log-probs and masks; refuses to know advantages. Each function gives [N, C], so that a loss reads
the same whether its ratio is a token's or its sequence's.
"""

from collections.abc import Callable

import mlx.core as mx

#: Bound of a log-ratio before exp: e^20 = 4.9e8, far beyond any use and safe to square in float32.
LOG_RATIO_LIMIT = 20.0


def exp_clamped(log_ratio: mx.array) -> mx.array:
    """Exp of a log-ratio clamped to ±20; beyond the clamp the gradient is 0."""
    return mx.exp(mx.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def token_log_ratio(logprobs: mx.array, anchor: mx.array, mask: mx.array) -> mx.array:  # noqa: ARG001
    """A token's own: log π − log π_old, [N, C]. PPO, 1707.06347."""
    return logprobs - anchor


def sequence_log_ratio(logprobs: mx.array, anchor: mx.array, mask: mx.array) -> mx.array:
    """Mean over the completion's tokens of the token log-ratio, repeated to [N, C]. GSPO, 2507.18071, eq. 7.

    Its gradient reaches every token of the completion with 1 / length.
    """
    log_ratio = mx.where(mask, logprobs - anchor, 0.0)
    length = mx.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mx.broadcast_to(log_ratio.sum(axis=1, keepdims=True) / length, logprobs.shape)


def sequence_token_log_ratio(logprobs: mx.array, anchor: mx.array, mask: mx.array) -> mx.array:
    """Value of the sequence's log-ratio, gradient of the token's own: sg[s] · π / sg[π]. GSPO-token, eq. 14.

    With one advantage for the whole completion its gradient is GSPO's.
    """
    sequence = sequence_log_ratio(logprobs, anchor, mask)
    return mx.stop_gradient(sequence) + (logprobs - mx.stop_gradient(logprobs))


LOG_RATIOS: dict[str, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "token": token_log_ratio,
    "sequence": sequence_log_ratio,
    "sequence_token": sequence_token_log_ratio,
}
