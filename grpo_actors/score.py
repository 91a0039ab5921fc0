"""A policy's score on held-out problems, with what it was measured on: only scores that were measured alike are compared.

Pure: numbers and names. It depends on no model, no task and no file.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(max_length=200)]
#: Name of a reward function, which may be the path of a file.
RewardName = Annotated[str, Field(max_length=5000)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
#: Reward function -> number.
PerReward = Annotated[dict[RewardName, float], Field(max_length=64)]

#: The two metrics that are always recorded; any other one is the name of a reward function.
ACCURACY: Literal["accuracy"] = "accuracy"
REWARD: Literal["reward"] = "reward"


class Form(BaseModel):
    """Base of the forms below, which files and messages have too: strictly typed and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Estimate(Form):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Measure(Form):
    """What a score was measured on, and how."""

    #: "accuracy", "reward" (the weighted sum of all reward functions), or the name of one reward function.
    metric: Name
    #: Of the reward functions that the metric adds up; empty for any metric other than "reward".
    weights: PerReward = {}
    #: Number of problems, and a digest of their ids and contents.
    problems: Annotated[int, Field(ge=1, le=2**53)]
    digest: Name
    #: At which the answers were sampled; 0: greedy.
    temperature: NotNegative
    #: Tokens after which an answer was cut.
    max_new_tokens: Annotated[int, Field(ge=1, le=2**53)]

    @property
    def how(self) -> str:
        """How the answers were made: ``greedy`` or ``sampled at temperature 1``."""
        return f"sampled at temperature {self.temperature:g}" if self.temperature else "greedy"

    def __str__(self) -> str:
        """``accuracy, greedy, on 200 held-out problems``."""
        return f"{self.metric}, {self.how}, on {self.problems:,} held-out problems"

    def changes(self, later: "Measure") -> str:
        """Describe what differs: ``max_new_tokens 256 → 128``; empty if both are equal."""
        before, after = self.model_dump(), later.model_dump()
        return ", ".join(f"{key} {before[key]} → {after[key]}" for key in before if before[key] != after[key])


class Score(Estimate):
    """The figure by which the checkpoints of a run are compared."""

    measure: Measure

    def beats(self, other: "Score") -> bool:
        """Return whether it is higher than a score that was measured alike."""
        assert self.measure == other.measure, self.measure.changes(other.measure)
        return self.value > other.value

    def __str__(self) -> str:
        """``0.412 [0.350, 0.475]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Report(Form):
    """All figures of one policy on the held-out problems."""

    #: The figure that decides.
    score: Score
    #: How much the score is above the base model's on the same problems; None for the base, or if that has no such score.
    gain: Estimate | None = None
    #: Share of greedy answers that are right, and its 95 % interval.
    accuracy: Share
    accuracy_low: Share
    accuracy_high: Share
    #: Mean weighted reward of greedy answers; None if no reward applies to any.
    reward: float | None
    #: The same two of answers sampled at the evaluator's temperature; None if none were sampled.
    sampled_accuracy: Share | None
    sampled_reward: float | None
    #: Unweighted mean of each reward function over the greedy answers to which it applies.
    rewards: PerReward
    #: Source of a mixture -> its part of the score, with the same measure on its problems.
    by_source: Annotated[dict[Name, Estimate], Field(max_length=64)] = {}
    completion_length_mean: NotNegative
    truncated_share: Share
    seconds: NotNegative


def best_of(scores: Mapping[int, Score]) -> int | None:
    """Return the update with the highest score; None without scores.

    Update 0 is the base model, which only a higher score beats. Of equal checkpoints the newest is the best.
    """
    checkpoints = {update: score for update, score in scores.items() if update}
    best = max(checkpoints, key=lambda update: (checkpoints[update].value, update), default=None)
    if 0 not in scores:
        return best
    return best if best is not None and checkpoints[best].beats(scores[0]) else 0


def verdict(gain: Estimate | None) -> str:
    """Say whether a gain is more than chance, to follow a score; empty if it is unknown.

    It is a difference only if its interval is on one side of 0.
    """
    if gain is None:
        return ""
    shown = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    if gain.low <= 0 <= gain.high:
        return f", {shown}: no difference that these problems show"
    return f", {shown}"
