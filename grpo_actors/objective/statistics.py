"""Compute statistics of the loss: sums over tokens, which add up over micro-batches, ranks and iterations.

Depends on the arrays of one micro-batch, not on the weights of tokens in the loss: except for the loss itself, every
mean here is over active tokens of equal weight.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.objective.kl import k3
from grpo_actors.objective.ratio import LOG_RATIO_LIMIT

Array = np.ndarray[Any, np.dtype[Any]]

#: The leading elements of the vector, and the last ones.
SUMS = (
    "loss",
    "tokens",
    "clip_low",
    "clip_high",
    "clip_delta",
    "ratio",
    "kl",
    "gap",
    "mismatch_kl",
    "cut",
    "entropy",
)
MAXIMA = ("ratio_max", "gap_max")
#: Number of leading elements that are statistics of the micro-batch; those of its completions follow.
_TOTALS = len(SUMS + MAXIMA)


def token_statistics(
    *,
    loss: mx.array,
    mask: mx.array,
    ratio: mx.array,
    bounds: tuple[float, float],
    second_bound: float | None,
    advantages: mx.array,
    kl: mx.array | None,
    log_mismatch: mx.array,
    cut: mx.array | None,
    entropies: mx.array | None,
    keeps_tokens: bool = False,
) -> mx.array:
    """Return `SUMS`, `MAXIMA` and the sum of each completion's gaps [N] as one float32 vector; active tokens count.

    With `keeps_tokens`, `log_mismatch` follows, row by row.

    It is one vector and not a dictionary of scalars for two reasons. It is copied to the host at once. And MLX 0.32
    fails to compile a value-and-grad with two equal outputs (``_Map_base::at``), which any two statistics that are
    off would be.

    Args:
        loss: The micro-batch's share of the loss, a scalar.
        mask: [N, C] bool.
        ratio: r, [N, C], as used by the loss.
        bounds: Ratios outside of which the loss has no gradient if A pushes outwards.
        second_bound: Ratio above which the loss has no gradient even if A < 0 pulls back; None if there is none.
        advantages: [N].
        kl: KL to the reference, [N, C]; None without a reference.
        log_mismatch: log π_old − log μ, [N, C]. Its k3 estimates KL(μ‖π_old), because μ sampled the tokens.
        cut: [N, C] bool, where a correction's weight was cut; None without a correction.
        entropies: Nats, [N, C]; None if unknown.
        keeps_tokens: Whether the mismatch of each token is to be kept.
    """
    A = advantages[:, None]
    gap = mx.where(mask, mx.abs(log_mismatch), 0.0).astype(mx.float32)
    values = {
        "loss": loss,
        "tokens": mask.sum(),
        "clip_low": _sum(mask, (ratio < bounds[0]) & (A < 0)),
        "clip_high": _sum(mask, (ratio > bounds[1]) & (A > 0)),
        "clip_delta": _sum(mask, None if second_bound is None else (ratio > second_bound) & (A < 0)),
        "ratio": _sum(mask, ratio),
        "kl": _sum(mask, kl),
        "gap": gap.sum(),
        "mismatch_kl": _sum(mask, k3(mx.clip(log_mismatch, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))),
        "cut": _sum(mask, cut),
        "entropy": _sum(mask, entropies),
        "ratio_max": mx.where(mask, ratio, 0.0).max(),
        "gap_max": gap.max(),
    }
    totals = mx.stack([values[name].astype(mx.float32) for name in SUMS + MAXIMA])
    tokens = [mx.where(mask, log_mismatch, 0.0).astype(mx.float32).reshape(-1)] if keeps_tokens else []
    return mx.stop_gradient(mx.concatenate([totals, gap.sum(axis=1), *tokens]))


def add_statistics(total: mx.array | None, more: mx.array) -> mx.array:
    """Combine the statistics of two parts, without those of single completions; `total` is None at first.

    Lazy: nothing is evaluated.
    """
    more = more[:_TOTALS]
    if total is None:
        return more
    n = len(SUMS)
    return mx.concatenate([total[:n] + more[:n], mx.maximum(total[n:], more[n:])])


def completion_gaps(statistics: mx.array) -> list[float]:
    """Return the sum of the gaps of each completion [N] of one micro-batch, in nats; waits for the device."""
    gaps: list[float] = np.array(statistics)[_TOTALS:].tolist()
    return gaps


def token_mismatches(statistics: mx.array, shape: tuple[int, int]) -> Array:
    """Return `log_mismatch` of a micro-batch whose mask has the shape [N, C]; 0 where masked. Needs ``keeps_tokens``."""
    N, C = shape
    first = _TOTALS + N
    return np.array(statistics)[first : first + N * C].reshape(N, C)


def summary(total: mx.array | None) -> dict[str, float | None]:
    """Return means under the names of the metrics; waits for the device.

    ``clip_share`` counts tokens clipped on either side, ``clip_delta_share`` tokens beyond the second bound, which
    ``clip_share`` leaves out, and ``correction_share`` tokens whose weight was cut. ``loss`` is a sum, not a mean.
    Without active tokens (or with `total` None), means and maxima are None: not measured.
    """
    values = np.zeros(_TOTALS) if total is None else np.array(total, np.float64)[:_TOTALS]
    of = dict(zip(SUMS + MAXIMA, values.tolist(), strict=True))
    tokens = of["tokens"]
    sums = {
        "kl": of["kl"],
        "clip_share": of["clip_low"] + of["clip_high"],
        "clip_low_share": of["clip_low"],
        "clip_high_share": of["clip_high"],
        "clip_delta_share": of["clip_delta"],
        "ratio_mean": of["ratio"],
        "logprob_gap_mean": of["gap"],
        "mismatch_kl": of["mismatch_kl"],
        "correction_share": of["cut"],
        "entropy": of["entropy"],
    }
    maxima = {"ratio_max": of["ratio_max"], "logprob_gap_max": of["gap_max"]}
    measured = {name: total / tokens for name, total in sums.items()} | maxima if tokens else {}
    return {"loss": of["loss"], "tokens": tokens, **dict.fromkeys(sums | maxima), **measured}


def _sum(mask: mx.array, x: mx.array | None) -> mx.array:
    if x is None:
        return mx.zeros(())
    return mx.where(mask, x.astype(mx.float32), 0.0).sum()
