"""[health]: the thresholds at which a run raises an alarm, and whether an alarm ends the run.

The rules are in `grpo_actors.observe.symptoms`; this module has only their thresholds.
"""

from typing import Literal

from pydantic import Field

from grpo_actors.config.section import Positive, Section


class HealthConfig(Section):
    """[health]: the thresholds of the alarms."""

    on_alarm: Literal["warn", "stop"] = Field(
        "warn",
        description="an alarm raised by an update is logged (warn), or also ends the run properly with a checkpoint, the "
        "evaluations and exit code 1 (stop)",
    )
    patience_updates: Positive = Field(
        10, description="updates in a row after which a symptom that may pass by itself becomes an alarm"
    )
    max_kl: float = Field(1.0, gt=0, description="KL to the reference, nats per token")
    max_ratio: float = Field(100.0, gt=1, description="an update's largest importance ratio")
    max_logprob_gap: float = Field(
        0.1, gt=0, description="mean difference between the worker's and the learner's log-probs, nats"
    )
    max_mismatch_kl: float = Field(
        0.05, gt=0, description="KL from the worker's to the learner's policy, nats per token"
    )
    min_entropy: float = Field(0.005, ge=0, description="entropy of the policy, nats per token")
    max_length_growth: float = Field(
        4.0, gt=1, description="mean completion length, in multiples of its initial value"
    )
    max_truncated_share: float = Field(
        0.8, gt=0, le=1, description="share of completions cut by max_new_tokens"
    )
    max_failed_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of completions, within patience_updates, for which a reward failed or no reward applied",
    )
    max_skipped_steps: Positive = Field(
        3, description="steps without a finite gradient, within patience_updates"
    )
