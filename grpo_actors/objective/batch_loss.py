"""Compute the loss of a run from the names and numbers of section [objective].

Depends on log-probs and one packed micro-batch, not on the model or the optimizer. Pure, so it can be used under
`mx.compile` and `mx.value_and_grad`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from grpo_actors.config.objective import LOSSES, ObjectiveConfig
from grpo_actors.objective import losses
from grpo_actors.objective.correction import correction_weights
from grpo_actors.objective.kl import token_kl
from grpo_actors.objective.ratio import LOG_RATIOS, exp_clamped
from grpo_actors.objective.statistics import token_statistics


def objective_loss(
    logprobs: mx.array,
    batch: Mapping[str, mx.array],
    objective: ObjectiveConfig,
    *,
    reference_logprobs: mx.array | None = None,
    old_logprobs: mx.array | None = None,
    entropies: mx.array | None = None,
    entropy_mask: mx.array | None = None,
    keeps_tokens: bool = False,
) -> tuple[mx.array, mx.array]:
    """Return the share of one micro-batch in the update's loss: Σ weight · (w L_t + β KL_t − c H_t).

    Args:
        logprobs: log π of the targets, [N, C], at the sampling temperature; differentiated.
        batch: `MicroBatch.arrays()`; reads mask, advantages, behaviour_logprobs and token_weights.
        objective: The settings of the loss.
        reference_logprobs: log π_ref, [N, C]; needed if kl_coeff > 0, otherwise only reported.
        old_logprobs: log π_old, [N, C], computed by the learner at the start of the update; needed if ratio is
            "recomputed". Without it the gap to the sampler is measured from `logprobs`.
        entropies: H of each token's distribution, nats, [N, C]; needed for the entropy bonus, which
            differentiates it.
        entropy_mask: [N, C] bool of `shaping.top_entropy_masks`. The other tokens have no L_t, but they still count
            in the denominators and keep their KL and entropy terms.
        keeps_tokens: As in `statistics.token_statistics`.

    Returns:
        The loss, a float32 scalar whose gradients add up over the micro-batches of an update, and the vector of
        `statistics.token_statistics`.

    Raises:
        ValueError: An array has another shape, or one that the objective needs is missing.
    """
    mask, weights = batch["mask"], batch["token_weights"]
    given = {"reference_logprobs": reference_logprobs, "old_logprobs": old_logprobs, "entropies": entropies}
    _check_arrays(logprobs, batch, objective, given, entropy_mask)
    # Padding may hold anything, even infinities: remove it before any arithmetic, forward and backward.
    logprobs = _active(mask, logprobs)
    behaviour = mx.stop_gradient(_active(mask, batch["behaviour_logprobs"]))
    old = behaviour if old_logprobs is None else mx.stop_gradient(_active(mask, old_logprobs))
    reference = None if reference_logprobs is None else _active(mask, reference_logprobs)

    row = LOSSES[objective.loss]
    log_ratio = LOG_RATIOS[row.ratio](logprobs, behaviour if objective.ratio == "recorded" else old, mask)
    inputs = {**objective.numbers, "logprobs": logprobs}
    L = _call(row.function, inputs, log_ratio, batch["advantages"])
    if entropy_mask is not None:
        L = mx.where(entropy_mask, L, 0.0)
    L, cut = _corrected(L, objective, old, behaviour, mask)
    L, kl = _with_terms(L, objective, logprobs, reference, entropies)
    loss = (weights * mx.where(mask, L, 0.0)).sum()
    bounds, second_bound = clip_bounds(objective)
    return loss, token_statistics(
        loss=loss,
        mask=mask,
        ratio=exp_clamped(log_ratio),
        bounds=bounds,
        second_bound=second_bound,
        advantages=batch["advantages"],
        kl=kl,
        log_mismatch=(logprobs if old_logprobs is None else old) - behaviour,
        cut=cut,
        entropies=entropies,
        keeps_tokens=keeps_tokens,
    )


def clip_bounds(objective: ObjectiveConfig) -> tuple[tuple[float, float], float | None]:
    """Return `bounds` and `second_bound` of `token_statistics`."""
    row, numbers = LOSSES[objective.loss], objective.numbers
    return _call(row.bounds, numbers), None if row.second_bound is None else numbers[row.second_bound]


def _corrected(
    L: mx.array, objective: ObjectiveConfig, old: mx.array, behaviour: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array | None]:
    """Return L_t times the correction's weight, and where that weight was cut."""
    if objective.correction == "none":
        return L, None
    bounds = {"floor": objective.correction_floor, "cap": objective.correction_cap}
    w, cut = correction_weights(objective.correction, old, behaviour, mask, **bounds)
    return w * L, cut


def _with_terms(
    L: mx.array,
    objective: ObjectiveConfig,
    logprobs: mx.array,
    reference: mx.array | None,
    entropies: mx.array | None,
) -> tuple[mx.array, mx.array | None]:
    """Return L_t + β KL_t − c H_t, and KL_t. A term with coefficient 0 is not added, so that it has no gradient."""
    kl = None if reference is None else token_kl(objective.kl_estimator, logprobs, reference)
    if kl is not None and objective.kl_coeff != 0:
        L = L + objective.kl_coeff * kl
    if entropies is not None and objective.entropy_coeff != 0:
        L = L - objective.entropy_coeff * entropies
    return L, kl


def _call(name: str, inputs: Mapping[str, Any], *arguments: mx.array) -> Any:
    """Call a function of a `LOSSES` row with the inputs that its keyword-only parameters name."""
    function = getattr(losses, name)
    parameters = inspect.signature(function).parameters.values()
    return function(*arguments, **{p.name: inputs[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})


def _active(mask: mx.array, x: mx.array) -> mx.array:
    return mx.where(mask, x.astype(mx.float32), 0.0)


def _check_arrays(
    logprobs: mx.array,
    batch: Mapping[str, mx.array],
    objective: ObjectiveConfig,
    given: Mapping[str, mx.array | None],
    entropy_mask: mx.array | None,
) -> None:
    needed = {
        "reference_logprobs": objective.kl_coeff > 0,
        "old_logprobs": objective.ratio == "recomputed",
        "entropies": objective.entropy_coeff != 0,
    }
    for name, is_needed in needed.items():
        if is_needed and given[name] is None:
            raise ValueError(f"this objective needs {name}, got None")
    if (objective.top_entropy_share < 1.0) != (entropy_mask is not None):
        raise ValueError(f"entropy_mask goes with top_entropy_share < 1, got {objective.top_entropy_share}")
    arrays = {k: batch[k] for k in ("mask", "behaviour_logprobs", "token_weights")}
    for name, array in {**arrays, **given, "entropy_mask": entropy_mask}.items():
        if array is not None and (logprobs.ndim != 2 or array.shape != logprobs.shape):
            raise ValueError(f"{name} must be [N, C] = {logprobs.shape} as logprobs, got {array.shape}")
