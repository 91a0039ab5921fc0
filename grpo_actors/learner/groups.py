"""Groups as the learner sees them: what a worker sent, with its prompt. Facts only, no derived values."""

from dataclasses import dataclass, field

from grpo_actors.tasks.task import Problem
from grpo_actors.wire.messages import Completion, read_floats, read_ints
from grpo_actors.wire.spans import sampled_mask


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """One completion, as the worker sent it."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finished: bool
    rewards: dict[str, float | None]
    #: As in `messages.Completion`; `sampled` and `last_turn` interpret it.
    inserted: list[int] = field(default_factory=list)

    #: As in `messages.Completion`.
    forced: list[int] = field(default_factory=list)
    #: Column -> what a reward function logged for the record of this completion.
    extra: dict[str, str | bool | int | float | None] = field(default_factory=dict)

    @property
    def sampled(self) -> list[bool]:
        """Return a flag for each token: True if the policy sampled it, False if it was inserted."""
        return sampled_mask(self.inserted + self.forced, len(self.tokens))

    @property
    def turns(self) -> int:
        """Return the number of turns that the policy took."""
        return 1 + len(self.inserted) // 2

    @property
    def turn_bounds(self) -> list[tuple[int, int]]:
        """Return the bounds of each turn of the policy, the second one exclusive."""
        bounds = [0, *self.inserted, len(self.tokens)]
        return list(zip(bounds[::2], bounds[1::2], strict=True))

    @property
    def last_turn(self) -> list[int]:
        """Return the tokens that are judged: those of the last turn."""
        return self.tokens[self.inserted[-1] :] if self.inserted else self.tokens

    @classmethod
    def read(cls, completion: Completion) -> "SampledCompletion":
        """Read a completion from its message."""
        return cls(
            read_ints(completion.tokens),
            read_floats(completion.logprobs),
            read_ints(completion.versions),
            completion.finished,
            completion.rewards,
            read_ints(completion.inserted),
            read_ints(completion.forced),
            completion.extra,
        )


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """One group of completions, with the prompt that they answer."""

    lease: int
    epoch: int
    problem: Problem
    prompt: list[int]
    worker: str
    completions: list[SampledCompletion]
    #: Reward that failed, or "environment" -> the error and the last lines of its traceback.
    failures: dict[str, str] = field(default_factory=dict, kw_only=True)
    #: Metric -> the values that reward functions logged.
    logged: dict[str, list[float]] = field(default_factory=dict, kw_only=True)
