"""Compute the overlong penalty from lengths, and select the tokens of highest entropy.

Depends on lengths and entropies on the host, not on rewards and losses.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def overlong_penalty(lengths: Array, *, max_new_tokens: int, overlong_tokens: int) -> Array:
    """Return a soft penalty on length: 0 up to L_max − L_c tokens, then linear to −1 at L_max.

    DAPO, 2503.14476, eq. 13.

    Args:
        lengths: [G] tokens of each completion.
        max_new_tokens: L_max.
        overlong_tokens: L_c, the width of the slope in tokens; 0 turns the penalty off.

    Returns:
        [G] float64 in [−1, 0], a penalty for `compute_advantages`.

    Raises:
        ValueError: L_c is negative or above L_max.
    """
    if not 0 <= overlong_tokens <= max_new_tokens:
        raise ValueError(
            f"overlong_tokens must be in [0, {max_new_tokens}] (max_new_tokens), got {overlong_tokens}"
        )
    lengths = np.asarray(lengths, np.float64)
    if overlong_tokens == 0:
        return np.zeros_like(lengths)
    return np.clip((max_new_tokens - overlong_tokens - lengths) / overlong_tokens, -1.0, 0.0)


def top_entropy_masks(entropies: Sequence[Array], masks: Sequence[Array], *, share: float) -> list[Array]:
    """Select the `share` of tokens with the highest entropy, over the WHOLE update. 2506.01939.

    TRL's `top_entropy_quantile` does the same, but for each micro-batch.

    Args:
        entropies: Nats, [N, C] for each micro-batch, under the policy at the start of the update.
        masks: [N, C] bool for each micro-batch.
        share: In (0, 1]; 0.2 in the paper. 1 keeps all.

    Returns:
        [N, C] bool for each micro-batch: tokens whose entropy reaches the quantile 1 − share (ties are kept). All
        micro-batches have one threshold, so that the split has no effect.

    Raises:
        ValueError: share is out of range, or a micro-batch's entropies and mask differ in shape.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    pairs = [(np.asarray(h, np.float64), np.asarray(m, bool)) for h, m in zip(entropies, masks, strict=True)]
    for h, m in pairs:
        if h.shape != m.shape:
            raise ValueError(f"entropies and mask must have one shape, got {h.shape} and {m.shape}")
    active = np.concatenate([np.zeros(0), *(h[m] for h, m in pairs)])
    threshold = np.quantile(active, 1.0 - share) if active.size else 0.0
    return [m & (h >= threshold) for h, m in pairs]
