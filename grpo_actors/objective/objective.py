"""The objective of a run: which names of the menu it uses with which numbers, and the loss that they make.

Knows log-probs and one packed micro-batch; refuses to know the model that gave them and the optimizer that
takes the gradient. Pure, and so composable under `mx.compile` and `mx.value_and_grad`.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import mlx.core as mx

from grpo_actors.errors import ConfigError
from grpo_actors.objective.advantages import ADVANTAGES
from grpo_actors.objective.aggregation import AGGREGATIONS
from grpo_actors.objective.correction import CORRECTIONS, correction_weights
from grpo_actors.objective.kl import KL_ESTIMATORS, token_kl
from grpo_actors.objective.losses import LOSSES
from grpo_actors.objective.ratio import LOG_RATIOS, exp_clamped
from grpo_actors.objective.statistics import token_statistics


@dataclass(frozen=True, slots=True)
class Objective:
    """Names and numbers of one objective. `None` means: derived from another, as said beside it.

    Raises:
        ConfigError: A name is not on the menu, a number out of its range, or two settings contradict.
    """

    advantage: str = "group"
    loss: str = "clip"
    aggregation: str = "dapo"
    clip_eps: float = 0.2  # ε_low
    clip_eps_high: float | None = None  # ε_high; None: clip_eps
    clip_delta: float = 4.0  # δ of two_sided
    dual_clip: float = 3.0  # c of dual_clip
    cispo_cap: float | None = None  # absolute; None: 1 + ε_high
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    kl_coeff: float = 0.0  # β; 0: no reference is needed
    kl_estimator: str = "k3"
    ratio: str = "recorded"  # against μ as the worker recorded it, or "recomputed": against π_old
    correction: str = "none"  # of π_old/μ, with ratio = "recomputed"
    correction_floor: float = 0.0  # C_min of the two masks
    correction_cap: float = 3.0  # C
    mask_truncated: bool = False
    overlong_tokens: int = 0  # L_c; 0: no penalty
    entropy_coeff: float = 0.0  # of the entropy bonus; 0: off
    top_entropy_share: float = 1.0  # of the tokens that train, those of highest entropy

    def __post_init__(self) -> None:
        for key, menu in _MENUS.items():
            _check_name(key, getattr(self, key), menu)
        for key, rule, holds in self._rules():
            if not holds:
                raise ConfigError(f"{key} must be {rule}, got {getattr(self, key)!r}")
        self._check_correction()

    @property
    def numbers(self) -> dict[str, Any]:
        """Every field by name, with `None` resolved."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self)}
        if numbers["clip_eps_high"] is None:
            numbers["clip_eps_high"] = self.clip_eps
        if numbers["cispo_cap"] is None:
            numbers["cispo_cap"] = 1.0 + numbers["clip_eps_high"]
        return numbers

    def used(self) -> frozenset[str]:
        """Names of the numbers that the chosen loss reads; a user who set another is told that it does nothing."""
        return frozenset(_keywords(LOSSES[self.loss].function)) & {f.name for f in fields(self)}

    def _rules(self) -> list[tuple[str, str, bool]]:
        """(field, rule, whether it holds). NaN fails every comparison."""
        n = self.numbers
        high = 1.0 + n["clip_eps_high"]
        return [
            ("clip_eps", "in [0, 1)", 0.0 <= self.clip_eps < 1.0),
            ("clip_eps_high", "≥ 0 and finite", 0.0 <= n["clip_eps_high"] < math.inf),
            (
                "clip_delta",
                f"> 1 + ε_high = {high:g}",
                self.loss != "two_sided" or high < self.clip_delta < math.inf,
            ),
            (
                "dual_clip",
                f"> 1 + ε_high = {high:g}",
                self.loss != "dual_clip" or high < self.dual_clip < math.inf,
            ),
            ("cispo_cap", "≥ 1 (it is the ratio itself, not its excess over 1)", n["cispo_cap"] >= 1.0),
            ("sapo_tau_positive", "> 0 and finite", 0.0 < self.sapo_tau_positive < math.inf),
            ("sapo_tau_negative", "> 0 and finite", 0.0 < self.sapo_tau_negative < math.inf),
            ("kl_coeff", "≥ 0 and finite", 0.0 <= self.kl_coeff < math.inf),
            ("correction_cap", "≥ 1 and finite", 1.0 <= self.correction_cap < math.inf),
            ("correction_floor", "in [0, 1]", 0.0 <= self.correction_floor <= 1.0),
            ("overlong_tokens", "≥ 0", self.overlong_tokens >= 0),
            ("entropy_coeff", "finite", math.isfinite(self.entropy_coeff)),
            ("top_entropy_share", "in (0, 1]", 0.0 < self.top_entropy_share <= 1.0),
        ]

    def _check_correction(self) -> None:
        if self.correction == "none":
            return
        if self.ratio == "recorded":
            raise ConfigError(
                f'correction = "{self.correction}" needs ratio = "recomputed" '
                '(a recorded ratio is already against the sampler), got ratio = "recorded"'
            )
        reason = LOSSES[self.loss].refuses.get(self.correction)
        if reason is not None:
            raise ConfigError(f'loss = "{self.loss}" forbids correction = "{self.correction}": {reason}')


def objective_loss(
    logprobs: mx.array,
    batch: Mapping[str, mx.array],
    objective: Objective,
    *,
    reference_logprobs: mx.array | None = None,
    old_logprobs: mx.array | None = None,
    entropies: mx.array | None = None,
    entropy_mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The part of the update's loss that lies in one micro-batch: Σ weight · (w L_t + β KL_t − c H_t).

    Args:
        logprobs: log π of the targets, [N, C], of the temperature that was sampled at; differentiated.
        batch: `MicroBatch.arrays()`: mask, advantages, behaviour_logprobs and token_weights are read.
        objective: What to compute.
        reference_logprobs: log π_ref, [N, C]; needed if kl_coeff > 0, only reported if not.
        old_logprobs: log π_old, [N, C], by the learner at the start of the update; needed if ratio is
            "recomputed". Without it the gap to the sampler is that of `logprobs`.
        entropies: H of each token's distribution, nats, [N, C]; needed for the entropy bonus, which
            differentiates it.
        entropy_mask: [N, C] bool of `shaping.top_entropy_masks`: other tokens lose L_t, but not their place in
            the denominators, nor KL and entropy.

    Returns:
        The loss, a float32 scalar whose gradients add up over the micro-batches of an update, and a vector of
        sums for `statistics.add_statistics`.

    Raises:
        ValueError: An array has another shape, or one that the objective needs is missing.
    """
    mask, weights = batch["mask"], batch["token_weights"]
    given = {"reference_logprobs": reference_logprobs, "old_logprobs": old_logprobs, "entropies": entropies}
    _check_arrays(logprobs, batch, objective, given, entropy_mask)
    # Padding may hold anything, infinities too: it is cut off before it meets arithmetic, forward and backward.
    logprobs = _active(mask, logprobs)
    behaviour = mx.stop_gradient(_active(mask, batch["behaviour_logprobs"]))
    old = behaviour if old_logprobs is None else mx.stop_gradient(_active(mask, old_logprobs))
    reference = None if reference_logprobs is None else _active(mask, reference_logprobs)

    row = LOSSES[objective.loss]
    log_ratio = LOG_RATIOS[row.ratio](logprobs, behaviour if objective.ratio == "recorded" else old, mask)
    inputs = {**objective.numbers, "logprobs": logprobs}
    L = row.function(log_ratio, batch["advantages"], **_pick(row.function, inputs))
    if entropy_mask is not None:
        L = mx.where(entropy_mask, L, 0.0)
    L, cut = _corrected(L, objective, old, behaviour, mask)
    L, kl = _with_terms(L, objective, logprobs, reference, entropies)
    loss = (weights * mx.where(mask, L, 0.0)).sum()
    return loss, token_statistics(
        loss=loss,
        mask=mask,
        ratio=exp_clamped(log_ratio),
        bounds=row.bounds(**_pick(row.bounds, inputs)),
        advantages=batch["advantages"],
        kl=kl,
        log_mismatch=(logprobs if old_logprobs is None else old) - behaviour,
        cut=cut,
        entropies=entropies,
    )


def _corrected(
    L: mx.array, objective: Objective, old: mx.array, behaviour: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array | None]:
    """L_t times the correction's weight, and where that was cut."""
    if objective.correction == "none":
        return L, None
    bounds = {"floor": objective.correction_floor, "cap": objective.correction_cap}
    w, cut = correction_weights(objective.correction, old, behaviour, mask, **bounds)
    return w * L, cut


def _with_terms(
    L: mx.array,
    objective: Objective,
    logprobs: mx.array,
    reference: mx.array | None,
    entropies: mx.array | None,
) -> tuple[mx.array, mx.array | None]:
    """L_t + β KL_t − c H_t, and KL_t. A term whose coefficient is 0 is not added: no gradient flows there."""
    kl = None if reference is None else token_kl(objective.kl_estimator, logprobs, reference)
    if kl is not None and objective.kl_coeff != 0:
        L = L + objective.kl_coeff * kl
    if entropies is not None and objective.entropy_coeff != 0:
        L = L - objective.entropy_coeff * entropies
    return L, kl


# The tables themselves, so that a row added by a user's module is on the menu.
_MENUS: dict[str, Collection[str]] = {
    "advantage": ADVANTAGES,
    "loss": LOSSES,
    "aggregation": AGGREGATIONS,
    "kl_estimator": KL_ESTIMATORS,
    "ratio": ("recorded", "recomputed"),
    "correction": ("none", *CORRECTIONS),
}


def _check_name(key: str, value: str, menu: Collection[str]) -> None:
    if value in menu:
        return
    nearest = get_close_matches(str(value), menu, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ConfigError(f"{key} must be one of {', '.join(menu)}, got {value!r}{hint}")


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _pick(function: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's function reads, handed over by name."""
    return {name: inputs[name] for name in _keywords(function)}


def _active(mask: mx.array, x: mx.array) -> mx.array:
    return mx.where(mask, x.astype(mx.float32), 0.0)


def _check_arrays(
    logprobs: mx.array,
    batch: Mapping[str, mx.array],
    objective: Objective,
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
