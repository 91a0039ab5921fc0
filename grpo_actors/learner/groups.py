"""Groups as the learner sees them: what a worker sent, with the prompt it answers. Facts only."""

from dataclasses import dataclass, field

from grpo_actors.tasks.task import Problem
from grpo_actors.wire.messages import Completion, read_floats, read_ints
from grpo_actors.wire.spans import sampled_mask


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """One completion as it arrived: facts only."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finished: bool
    text: str
    rewards: dict[str, float | None]
    #: These two as in `messages.Completion`; `sampled` and `answer` read them.
    inserted: list[int] = field(default_factory=list)
    last_turn: str | None = None

    @property
    def sampled(self) -> list[bool]:
        """Of each token whether the policy sampled it; the others are an environment's."""
        return sampled_mask(self.inserted, len(self.tokens))

    @property
    def turns(self) -> int:
        """Of the policy."""
        return 1 + len(self.inserted) // 2

    @property
    def answer(self) -> str:
        """The text that is judged: the last turn's."""
        return self.text if self.last_turn is None else self.last_turn

    @classmethod
    def read(cls, completion: Completion) -> "SampledCompletion":
        """From its message."""
        return cls(
            read_ints(completion.tokens),
            read_floats(completion.logprobs),
            read_ints(completion.versions),
            completion.finished,
            completion.text,
            completion.rewards,
            read_ints(completion.inserted),
            completion.last_turn,
        )


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """One group that was accepted, with the prompt it answers."""

    lease: int
    epoch: int
    problem: Problem
    prompt: list[int]
    worker: str
    completions: list[SampledCompletion]
