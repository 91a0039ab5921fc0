"""Groups as the learner sees them: what a worker sent, with the prompt it answers. Facts only."""

from dataclasses import dataclass

from grpo_actors.messages import Completion, read_floats, read_ints
from grpo_actors.tasks.task import Problem


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """One completion as it arrived: facts only."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finished: bool
    text: str
    rewards: dict[str, float | None]

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
