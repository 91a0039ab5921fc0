"""The loss of one token, minimised: a pure function for each algorithm, and the table of their names.

Knows ratio and advantage; refuses to know masks, weights of tokens, KL and who sampled. In every formula

    log_ratio  log r, [N, C]: log π − log π_old of a token, or of its sequence (`ratio.LOG_RATIOS`)
    advantages A, [N]: one for each completion
    L_t        [N, C], the value returned

and at π = π_old the gradient of a completion's ΣL_t is that of −A Σ log π, whichever the loss. To add an algorithm, write its function
and its row. A function's keyword-only parameters are named like the settings of section [objective] that it reads
(and ``logprobs``, log π [N, C], if it needs them): they are handed over by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from grpo_actors.objective.ratio import exp_clamped


def clip_loss(
    log_ratio: mx.array, advantages: mx.array, *, clip_eps: float, clip_eps_high: float
) -> mx.array:
    """L_t = −min(r A, clip(r, 1 − ε_low, 1 + ε_high) A). PPO, 1707.06347; ε_high apart: DAPO, 2503.14476.

    No gradient where r has already left the interval in the direction that A asks for.
    On a sequence's ratio this is GSPO (2507.18071, there with ε 3e-4 and 4e-4).
    """
    r, A = exp_clamped(log_ratio), _columns(log_ratio, advantages)
    return -mx.minimum(r * A, mx.clip(r, 1.0 - clip_eps, 1.0 + clip_eps_high) * A)


def two_sided_loss(
    log_ratio: mx.array, advantages: mx.array, *, clip_eps: float, clip_eps_high: float, clip_delta: float
) -> mx.array:
    """L_t = −min(min(r, δ) A, clip(r, 1 − ε_low, 1 + ε_high) A), δ > 1 + ε_high. INTELLECT-2, 2505.07291.

    The clip loss, except that a token of negative A whose r exploded beyond δ has no gradient either.
    """
    r, A = exp_clamped(log_ratio), _columns(log_ratio, advantages)
    return -mx.minimum(mx.minimum(r, clip_delta) * A, mx.clip(r, 1.0 - clip_eps, 1.0 + clip_eps_high) * A)


def dual_clip_loss(
    log_ratio: mx.array, advantages: mx.array, *, clip_eps: float, clip_eps_high: float, dual_clip: float
) -> mx.array:
    """L = the clip loss; where A < 0, L_t = min(L, −c A), c > 1. Dual-clip PPO, 1912.09729.

    The same bound as `two_sided_loss` with δ = c, written on the loss.
    """
    L = clip_loss(log_ratio, advantages, clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    A = _columns(log_ratio, advantages)
    return mx.where(A < 0, mx.minimum(L, -dual_clip * A), L)


def cispo_loss(
    log_ratio: mx.array, advantages: mx.array, *, logprobs: mx.array, cispo_cap: float
) -> mx.array:
    """L_t = −sg[min(r, cap)] A log π. CISPO (MiniMax-M1), 2506.13585.

    REINFORCE with a truncated weight: unlike a clip, every token keeps a gradient. The cap is absolute;
    the paper's and verl's is 1 + ε_high (the default), TRL's ``epsilon_high`` is the cap itself.
    """
    A = _columns(log_ratio, advantages)
    return -mx.stop_gradient(mx.minimum(exp_clamped(log_ratio), cispo_cap)) * A * logprobs


def sapo_loss(
    log_ratio: mx.array, advantages: mx.array, *, sapo_tau_positive: float, sapo_tau_negative: float
) -> mx.array:
    """L_t = −(4/τ) σ(τ (r − 1)) A, with τ by the sign of A. SAPO, 2511.20347.

    A soft gate in place of the clip: the gradient fades as 4 σ (1 − σ), faster for negative A.
    """
    r, A = exp_clamped(log_ratio), _columns(log_ratio, advantages)
    tau = mx.where(A > 0, sapo_tau_positive, sapo_tau_negative)
    return -(4.0 / tau) * mx.sigmoid(tau * (r - 1.0)) * A


def interval_bounds(*, clip_eps: float, clip_eps_high: float) -> tuple[float, float]:
    """Ratios between which the clip loss has a gradient whatever the sign of A."""
    return 1.0 - clip_eps, 1.0 + clip_eps_high


def cap_bounds(*, cispo_cap: float) -> tuple[float, float]:
    """CISPO cuts only above."""
    return 0.0, cispo_cap


def no_bounds() -> tuple[float, float]:
    """Nothing is ever clipped."""
    return 0.0, float("inf")


@dataclass(frozen=True, slots=True)
class Loss:
    """One row of `LOSSES`."""

    #: ``f(log_ratio [N, C], advantages [N], *, …) -> L_t [N, C]``.
    function: Callable[..., mx.array]
    #: Whose log-ratio it is given: a key of `ratio.LOG_RATIOS`.
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    #: Ratios outside of which a token counts as clipped, for the share reported.
    bounds: Callable[..., tuple[float, float]] = interval_bounds
    #: The setting that bounds the ratio of a token of A < 0 from above as well; None: the loss has no such bound.
    second_bound: str | None = None


LOSSES: dict[str, Loss] = {
    "clip": Loss(clip_loss),
    "two_sided": Loss(two_sided_loss, second_bound="clip_delta"),
    "dual_clip": Loss(dual_clip_loss, second_bound="dual_clip"),
    "gspo": Loss(clip_loss, ratio="sequence"),
    "gspo_token": Loss(clip_loss, ratio="sequence_token"),
    "cispo": Loss(cispo_loss, bounds=cap_bounds),
    "sapo": Loss(sapo_loss, bounds=no_bounds),
}


def _columns(log_ratio: mx.array, advantages: mx.array) -> mx.array:
    """A as [N, 1] beside [N, C]; an A of another shape would broadcast to nonsense without a word."""
    if log_ratio.ndim != 2 or advantages.shape != log_ratio.shape[:1]:
        raise ValueError(
            f"log_ratio must be [N, C] and advantages [N], got {log_ratio.shape} and {advantages.shape}"
        )
    return advantages[:, None]
