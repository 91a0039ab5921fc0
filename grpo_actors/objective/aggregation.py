"""Compute the weight of each token's loss in the sum over an update; the aggregations differ in nothing else.

Depends on lengths only, not on losses or micro-batches. loss = Σ weight · L_t over all tokens of the update, with
the denominators of the WHOLE update. So the split into micro-batches, padding and the number of ranks do not affect
the gradient. Differences from others: TRL's ``bnpo`` divides by the tokens of each micro-batch, so it changes with
the split. TRL's ``dr_grpo`` averages over micro-batches, which makes no difference if all have the same number of
completions. TRL and verl count masked completions in the denominator of ``grpo``; here they are left out.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def grpo_weights(lengths: Array, max_new_tokens: int) -> Array:  # noqa: ARG001 - the table's signature
    """Average over a completion's tokens, then over completions: 1 / (length · active completions). 2402.03300.

    A token of a long completion weighs less. Masked completions are left out of the mean.
    """
    active = np.count_nonzero(lengths)
    return _reciprocal(lengths * active)


def dapo_weights(lengths: Array, max_new_tokens: int) -> Array:  # noqa: ARG001 - the table's signature
    """Average over all active tokens of the update: 1 / Σ lengths. DAPO, 2503.14476.

    ``bnpo`` (TRL's name, "batch-normalised") is the same here. The two differ only in which tokens are counted,
    those of a micro-batch or those of the update, and here it is always those of the update.
    """
    return np.where(lengths > 0, _reciprocal(np.full(lengths.shape, lengths.sum())), 0.0)


def dr_grpo_weights(lengths: Array, max_new_tokens: int) -> Array:
    """Divide the sum over tokens by completions · max_new_tokens: no length bias. Dr. GRPO, 2503.20783.

    Masked completions still count in the denominator: it is a constant of the settings, not of the data.
    """
    return np.where(lengths > 0, _reciprocal(np.full(lengths.shape, lengths.size * max_new_tokens)), 0.0)


AGGREGATIONS: dict[str, Callable[[Array, int], Array]] = {
    "grpo": grpo_weights,
    "bnpo": dapo_weights,
    "dr_grpo": dr_grpo_weights,
    "dapo": dapo_weights,
}


def token_weights(name: str, lengths: Array, *, max_new_tokens: int) -> Array:
    """Return the weight of a token of each completion: all tokens of a completion weigh the same.

    Args:
        name: A key of `AGGREGATIONS`.
        lengths: [N] active tokens of every completion of the update; 0 for a masked one.
        max_new_tokens: L_max, tokens; only ``dr_grpo`` reads it.

    Returns:
        [N] float64; 0 for a masked completion, and everywhere if all are masked.

    Raises:
        ValueError: max_new_tokens is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be ≥ 1, got {max_new_tokens}")
    return AGGREGATIONS[name](np.asarray(lengths, np.int64), max_new_tokens)


def _reciprocal(x: Array) -> Array:
    return np.divide(1.0, x, out=np.zeros(x.shape), where=x > 0)
