"""The losses of one token, to be minimised: pure functions, named in the rows of `config.objective.LOSSES`.

Depend on ratio and advantage only, not on masks, token weights, KL or the sampler. In every formula

    log_ratio  log r, [N, C]: log π − log π_old of a token, or of its sequence (`ratio.LOG_RATIOS`)
    advantages A, [N]: one for each completion
    L_t        [N, C], the value returned

At π = π_old the gradient of a completion's ΣL_t is that of −A Σ log π, for every loss. The keyword-only parameters of
a function are named like the settings of section [objective] that it reads, and are passed by name. A function that
needs log π [N, C] has the parameter ``logprobs``.
"""

import mlx.core as mx

from grpo_actors.objective.ratio import exp_clamped


def clip_loss(
    log_ratio: mx.array, advantages: mx.array, *, clip_eps: float, clip_eps_high: float
) -> mx.array:
    """Return L_t = −min(r A, clip(r, 1 − ε_low, 1 + ε_high) A). PPO, 1707.06347; separate ε_high: DAPO, 2503.14476.

    There is no gradient where r has already left the interval in the direction of A.
    With the ratio of a sequence this is GSPO (2507.18071, there with ε 3e-4 and 4e-4).
    """
    r, A = exp_clamped(log_ratio), _columns(log_ratio, advantages)
    return -mx.minimum(r * A, mx.clip(r, 1.0 - clip_eps, 1.0 + clip_eps_high) * A)


def two_sided_loss(
    log_ratio: mx.array, advantages: mx.array, *, clip_eps: float, clip_eps_high: float, clip_delta: float
) -> mx.array:
    """Return L_t = −min(min(r, δ) A, clip(r, 1 − ε_low, 1 + ε_high) A), δ > 1 + ε_high. INTELLECT-2, 2505.07291.

    This is the clip loss, except that a token with negative A and r > δ has no gradient either.
    """
    r, A = exp_clamped(log_ratio), _columns(log_ratio, advantages)
    return -mx.minimum(mx.minimum(r, clip_delta) * A, mx.clip(r, 1.0 - clip_eps, 1.0 + clip_eps_high) * A)


def dual_clip_loss(
    log_ratio: mx.array, advantages: mx.array, *, clip_eps: float, clip_eps_high: float, dual_clip: float
) -> mx.array:
    """Return the clip loss L; where A < 0, L_t = min(L, −c A), c > 1. Dual-clip PPO, 1912.09729.

    This is the bound of `two_sided_loss` with δ = c, applied to the loss instead of the ratio.
    """
    L = clip_loss(log_ratio, advantages, clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    A = _columns(log_ratio, advantages)
    return mx.where(A < 0, mx.minimum(L, -dual_clip * A), L)


def cispo_loss(
    log_ratio: mx.array, advantages: mx.array, *, logprobs: mx.array, cispo_cap: float
) -> mx.array:
    """Return L_t = −sg[min(r, cap)] A log π. CISPO (MiniMax-M1), 2506.13585.

    This is REINFORCE with a truncated weight: unlike with a clip, every token keeps a gradient. The cap is absolute.
    The paper and verl use 1 + ε_high (the default here); TRL's ``epsilon_high`` is the cap itself.
    """
    A = _columns(log_ratio, advantages)
    return -mx.stop_gradient(mx.minimum(exp_clamped(log_ratio), cispo_cap)) * A * logprobs


def sapo_loss(
    log_ratio: mx.array, advantages: mx.array, *, sapo_tau_positive: float, sapo_tau_negative: float
) -> mx.array:
    """Return L_t = −(4/τ) σ(τ (r − 1)) A, with τ by the sign of A. SAPO, 2511.20347.

    A soft gate replaces the clip: the gradient fades as 4 σ (1 − σ), faster for negative A.
    """
    r, A = exp_clamped(log_ratio), _columns(log_ratio, advantages)
    tau = mx.where(A > 0, sapo_tau_positive, sapo_tau_negative)
    return -(4.0 / tau) * mx.sigmoid(tau * (r - 1.0)) * A


def interval_bounds(*, clip_eps: float, clip_eps_high: float) -> tuple[float, float]:
    """Return the ratios between which the clip loss has a gradient for either sign of A."""
    return 1.0 - clip_eps, 1.0 + clip_eps_high


def cap_bounds(*, cispo_cap: float) -> tuple[float, float]:
    """Return the bounds of CISPO, which cuts only above."""
    return 0.0, cispo_cap


def no_bounds() -> tuple[float, float]:
    """Return bounds that no ratio reaches: nothing is clipped."""
    return 0.0, float("inf")


def _columns(log_ratio: mx.array, advantages: mx.array) -> mx.array:
    """Return A as [N, 1], to go with [N, C]; an A of another shape would silently broadcast to a wrong result."""
    if log_ratio.ndim != 2 or advantages.shape != log_ratio.shape[:1]:
        raise ValueError(
            f"log_ratio must be [N, C] and advantages [N], got {log_ratio.shape} and {advantages.shape}"
        )
    return advantages[:, None]
