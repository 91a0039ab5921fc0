"""What the loss of one token weighs in the sum over an update: all that the aggregations' names differ in.

Knows lengths; refuses to know losses and micro-batches. loss = Σ weight · L_t over all tokens of the
update, with the denominators of the WHOLE update, so that neither the split into micro-batches nor
padding nor the number of ranks reaches the gradient. TRL's ``bnpo`` divides by each micro-batch's own tokens, so it
changes with the split; its ``dr_grpo`` averages over micro-batches, which changes nothing if all have equally many
completions. TRL and verl count masked completions in ``grpo``'s denominator; here they leave it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def grpo_weights(lengths: Array, max_new_tokens: int) -> Array:  # noqa: ARG001 - the table's signature
    """Mean over a completion's tokens, then over completions: 1 / (length · active completions). 2402.03300.

    A token of a long completion weighs less. Masked completions leave the mean.
    """
    active = np.count_nonzero(lengths)
    return _reciprocal(lengths * active)


def dapo_weights(lengths: Array, max_new_tokens: int) -> Array:  # noqa: ARG001 - the table's signature
    """Mean over all active tokens of the update: 1 / Σ lengths. DAPO, 2503.14476.

    Also ``bnpo`` (TRL's name, "batch-normalised"): the two differ only in whose tokens are counted, a
    micro-batch's or the update's, and here the update's are always.
    """
    return np.where(lengths > 0, _reciprocal(np.full(lengths.shape, lengths.sum())), 0.0)


def dr_grpo_weights(lengths: Array, max_new_tokens: int) -> Array:
    """Sum over tokens divided by completions · max_new_tokens: no length bias. Dr. GRPO, 2503.20783.

    Masked completions keep their place in the denominator: a constant of the settings, not of the data.
    """
    return np.where(lengths > 0, _reciprocal(np.full(lengths.shape, lengths.size * max_new_tokens)), 0.0)


AGGREGATIONS: dict[str, Callable[[Array, int], Array]] = {
    "grpo": grpo_weights,
    "bnpo": dapo_weights,
    "dr_grpo": dr_grpo_weights,
    "dapo": dapo_weights,
}


def token_weights(name: str, lengths: Array, *, max_new_tokens: int) -> Array:
    """Weight of each token, the same for all tokens of a completion.

    Args:
        name: A key of `AGGREGATIONS`.
        lengths: [N] active tokens of every completion of the update; 0 for a masked one.
        max_new_tokens: L_max, tokens; read by ``dr_grpo`` alone.

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
