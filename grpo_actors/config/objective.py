"""[objective]: the loss that the learner minimises, and the settings behind the names of papers.

The formulas are in `grpo_actors.objective`. This module has only names and numbers, so that a configuration can be
read and rejected without MLX. A loss is one row of `LOSSES` and its function in `objective/losses.py`. An algorithm
is one row of `PRESETS`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from grpo_actors.config.section import NotNegative, Section


@dataclass(frozen=True, slots=True)
class Loss:
    """One row of `LOSSES`. A test compares `reads` with the function's arguments."""

    #: Name in `objective/losses.py`: ``f(log_ratio [N, C], advantages [N], *, …) -> L_t [N, C]``.
    function: str
    #: Settings that the function reads; the others have no effect with this loss.
    reads: frozenset[str]
    #: Log-ratio that the function gets: a key of `objective.ratio.LOG_RATIOS`.
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    #: Name of the function in the same file that returns the ratios outside of which a token counts as clipped.
    bounds: str = "interval_bounds"
    #: Setting above which a ratio has no gradient even where A < 0; None if the loss has no such bound.
    second_bound: str | None = None


_INTERVAL = frozenset({"clip_eps", "clip_eps_high"})

LOSSES: dict[str, Loss] = {
    "clip": Loss("clip_loss", _INTERVAL),
    "two_sided": Loss("two_sided_loss", _INTERVAL | {"clip_delta"}, second_bound="clip_delta"),
    "dual_clip": Loss("dual_clip_loss", _INTERVAL | {"dual_clip"}, second_bound="dual_clip"),
    "gspo": Loss("clip_loss", _INTERVAL, ratio="sequence"),
    "gspo_token": Loss("clip_loss", _INTERVAL, ratio="sequence_token"),
    "cispo": Loss("cispo_loss", frozenset({"cispo_cap"}), bounds="cap_bounds"),
    "sapo": Loss("sapo_loss", frozenset({"sapo_tau_positive", "sapo_tau_negative"}), bounds="no_bounds"),
}

#: The clip interval of PPO, used by most of the papers.
_CLIP: dict[str, Any] = {"clip_eps": 0.2, "clip_eps_high": 0.2}

#: Algorithm -> its settings, by leaf name. They include every number that its loss reads, so that a number given in
#: a file for another loss does not reach it. Other settings keep their defaults. No preset sets kl_coeff: the value
#: in a paper belongs to its model and its data.
PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, 2402.03300: the mean over a completion's tokens, then over completions.
    "grpo": {"advantage": "group", "loss": "clip", "aggregation": "grpo", **_CLIP},
    # 2503.20783: no division by the deviation or by the length.
    "dr_grpo": {"advantage": "none", "loss": "clip", "aggregation": "dr_grpo", **_CLIP},
    # 2503.14476: clip-higher, token-level loss, dynamic sampling. The overlong penalty is not set, because it depends
    # on your limit: overlong_tokens, in the paper a fifth of max_new_tokens.
    "dapo": {
        "advantage": "group",
        "loss": "clip",
        "aggregation": "dapo",
        "clip_eps": 0.2,
        "clip_eps_high": 0.28,
        "dynamic_sampling": True,
    },
    # 2507.18071, section 5.1: the ratio of a sequence moves far less than that of a token.
    "gspo": {
        "advantage": "group",
        "loss": "gspo",
        "aggregation": "grpo",
        "clip_eps": 3e-4,
        "clip_eps_high": 4e-4,
    },
    # MiniMax-M1, 2506.13585; the cap is that of ScaleRL (2510.13786).
    "cispo": {"advantage": "group", "loss": "cispo", "aggregation": "dapo", "cispo_cap": 5.0},
    # 2511.20347.
    "sapo": {
        "advantage": "group",
        "loss": "sapo",
        "aggregation": "grpo",
        "sapo_tau_positive": 1.0,
        "sapo_tau_negative": 1.05,
    },
    # 2402.14740: REINFORCE on whole completions; the constant of dr_grpo makes the loss their sum, up to a factor.
    # On policy, nothing is clipped.
    "rloo": {"advantage": "rloo", "loss": "clip", "aggregation": "dr_grpo", **_CLIP},
    # 2601.05242: every reward function is normalised separately.
    "gdpo": {"advantage": "gdpo", "loss": "clip", "aggregation": "grpo", **_CLIP},
    # 2505.07291: a second bound, for negative advantages; groups without a signal are replaced.
    "intellect2": {
        "advantage": "group",
        "loss": "two_sided",
        "aggregation": "dapo",
        "clip_delta": 4.0,
        "dynamic_sampling": True,
        **_CLIP,
    },
    # 2505.24298, decoupled PPO: the proximal policy is the learner's, the behaviour policy the worker's. As in
    # its authors' code, a token whose weight is above the cap is left out of the loss.
    "areal": {
        "loss": "clip",
        "ratio": "recomputed",
        "correction": "token_mask",
        "correction_floor": 0.0,
        "correction_cap": 5.0,
        **_CLIP,
    },
}

#: Settings for quantised workers: their policy differs from the learner's, so recorded ratios would not start at 1.
QUANTISED_ROLLOUT: dict[str, Any] = {"ratio": "recomputed", "correction": "token_truncate"}

if TYPE_CHECKING:  # a type checker cannot read the keys of a table
    _Algorithm = str
    _Loss = str
else:
    _Algorithm = Literal[tuple(PRESETS)]
    _Loss = Literal[tuple(LOSSES)]


class ObjectiveConfig(Section):
    """[objective]: the loss that the learner minimises. The names are rows of tables, here or in `objective/`."""

    algorithm: _Algorithm | None = Field(
        None, description="a paper's choice of the settings below; settings given by hand win"
    )
    advantage: Literal["group", "none", "batch", "rloo", "gdpo"] = Field(
        "group",
        description="reward minus the group's mean, divided by the deviation of the group (group), by nothing (none) or "
        "by the deviation of the batch (batch); minus the mean of the others (rloo); or normalised for each reward (gdpo)",
    )
    loss: _Loss = Field("clip", description="the loss of one token")
    aggregation: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = Field(
        "dapo",
        description="divisor of the sum over tokens: completion length (grpo), max_new_tokens (dr_grpo), or the tokens "
        "of the update (dapo, bnpo)",
    )
    clip_eps: float = Field(0.2, gt=0, lt=1, description="importance ratios are clipped below 1 - clip_eps")
    clip_eps_high: float | None = Field(
        None, gt=0, description="importance ratios are clipped above 1 + clip_eps_high; not set: clip_eps"
    )
    clip_delta: float = Field(4.0, gt=1, description="two_sided: largest ratio that still has a gradient")
    dual_clip: float = Field(
        3.0, gt=1, description="dual_clip: largest ratio that still has a gradient where A < 0"
    )
    cispo_cap: float | None = Field(
        None, ge=1, description="cispo: largest weight of a token; not set: 1 + clip_eps_high"
    )
    sapo_tau_positive: float = Field(1.0, gt=0, description="sapo: sharpness of the gate where A > 0")
    sapo_tau_negative: float = Field(1.05, gt=0, description="sapo: sharpness of the gate where A < 0")
    kl_coeff: float = Field(
        0.0, ge=0, description="weight of the KL to the reference; 0: no reference is kept"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="estimator of a token's KL")
    reference_refresh_updates: NotNegative = Field(
        0, description="updates between two moves of the reference towards the policy; 0: it never moves"
    )
    reference_refresh_alpha: float = Field(
        0.6, gt=0, le=1, description="share of the policy in such a move; 1: the policy becomes the reference"
    )
    ratio: Literal["recorded", "recomputed"] = Field(
        "recorded",
        description="importance ratios against the log-probs of the worker (recorded), or against those of the learner "
        "at the start of the update (recomputed)",
    )
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "none",
        description="with ratio = recomputed: weight that corrects for the gap between learner and worker log-probs",
    )
    correction_floor: float = Field(
        0.0, ge=0, le=1, description="masks: tokens of smaller weight are left out of the loss"
    )
    correction_cap: float = Field(
        3.0,
        ge=1,
        description="larger weights are cut to this value (truncate) or left out of the loss (mask)",
    )
    mask_truncated: bool = Field(default=False, description="leave truncated completions out of the loss")
    overlong_tokens: NotNegative = Field(
        0, description="this many last tokens before max_new_tokens cost up to 1 of reward (DAPO); 0: off"
    )
    entropy_coeff: float = Field(0.0, description="weight of the entropy bonus; 0: off")
    top_entropy_share: float = Field(
        1.0, gt=0, le=1, description="share of tokens that train, those of highest entropy; 1: all"
    )

    @property
    def numbers(self) -> dict[str, Any]:
        """Return every setting by name; those that are not set are derived from others."""
        numbers = dict(self)
        if self.clip_eps_high is None:
            numbers["clip_eps_high"] = self.clip_eps
        if self.cispo_cap is None:
            numbers["cispo_cap"] = 1.0 + numbers["clip_eps_high"]
        return numbers
