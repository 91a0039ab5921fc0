"""The problems of a run as leases, and what comes back as groups: data in, messages out. No socket.

Knows what a group of this run must look like, so that nothing reaches the learner's arithmetic that
would break it: a token id outside the vocabulary, a version from the future, an unknown reward.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from grpo_actors.errors import DataError, ProtocolError
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.schedule.lease import Granted
from grpo_actors.schedule.order import ProblemOrder, sample_seeds
from grpo_actors.tasks.task import Problem
from grpo_actors.wire.messages import Completion, Group, Lease, ints

#: Tokenised prompts that are kept, for the lease to the group: more than are open at a time.
PROMPTS_HELD = 1024


@dataclass
class Supply:
    """The problems of a run, in order."""

    problems: Sequence[Problem]
    order: ProblemOrder
    seed: int
    num_generations: int
    max_prompt_length: int
    max_new_tokens: int
    #: Token ids are below it.
    vocab_size: int
    #: Names of the reward functions; every completion has a value, or None, for each.
    rewards: frozenset[str]
    #: Messages -> token ids.
    encode_chat: Callable[[Sequence[Mapping[str, str]]], list[int]]
    _encoded: Callable[[int], list[int]] = field(init=False)
    _left_out_in_a_row: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._encoded = lru_cache(PROMPTS_HELD)(lambda index: self.encode_chat(self.problems[index].messages))

    def problem(self, position: int) -> tuple[int, Problem]:
        """(epoch, problem) at a position of the order."""
        place = self.order.at(position)
        return place.epoch, self.problems[place.index]

    def prompt(self, position: int) -> list[int]:
        """Token ids of the prompt at a position of the order."""
        return self._encoded(self.order.at(position).index)

    def too_long(self, position: int) -> str | None:
        """Why the problem at a position is left out; None: it is not.

        Raises:
            DataError: a whole epoch is left out.
        """
        length = len(self.prompt(position))
        if length <= self.max_prompt_length:
            self._left_out_in_a_row = 0
            return None
        self._left_out_in_a_row += 1
        # Positions are asked for in order: twice as many hold one whole epoch, wherever they began.
        if self._left_out_in_a_row > 2 * len(self.problems):
            raise DataError(
                f"data.max_prompt_length: no problem has a prompt of at most {self.max_prompt_length} tokens; raise it"
            )
        _, problem = self.problem(position)
        return f"{problem.id} left out: {length} prompt tokens, data.max_prompt_length is {self.max_prompt_length}"

    def lease(self, granted: Granted) -> Lease:
        """The message for one grant."""
        epoch, problem = self.problem(granted.lease)
        return Lease(
            lease=granted.lease,
            attempt=granted.attempt,
            min_version=granted.min_version,
            problem_id=problem.id,
            prompt=ints(self.prompt(granted.lease)),
            seeds=sample_seeds(self.seed, epoch, problem.id, self.num_generations),
            messages=list(problem.messages),
            answer=problem.answer,
            columns=json.dumps(dict(problem.columns)),  # type: ignore[arg-type]  # pydantic reads the text
        )

    def group(self, message: Group, worker: str, newest_version: int) -> SampledGroup:
        """A group as the learner sees it.

        Raises:
            ProtocolError: it is none of this run's; the text says why.
        """
        if len(message.completions) != self.num_generations:
            raise ProtocolError(
                f"a group has {self.num_generations} completions, got {len(message.completions)}"
            )
        for completion in message.completions:
            self._check(completion, newest_version)
        epoch, problem = self.problem(message.lease)
        completions = [SampledCompletion.read(completion) for completion in message.completions]
        return SampledGroup(message.lease, epoch, problem, self.prompt(message.lease), worker, completions)

    def _check(self, completion: Completion, newest_version: int) -> None:
        tokens, versions = (memoryview(raw).cast("i") for raw in (completion.tokens, completion.versions))
        if len(tokens) > self.max_new_tokens:
            raise ProtocolError(f"a completion has at most {self.max_new_tokens} tokens, got {len(tokens)}")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise ProtocolError(
                f"token ids lie in 0 … {self.vocab_size - 1}, got {min(tokens)} … {max(tokens)}"
            )
        if min(versions) < 0 or max(versions) > newest_version:
            raise ProtocolError(
                f"version {newest_version} is the newest, got {min(versions)} … {max(versions)}"
            )
        if completion.rewards.keys() != self.rewards:
            raise ProtocolError(
                f"the rewards are {', '.join(sorted(self.rewards))}, got {', '.join(sorted(completion.rewards))[:200]}"
            )


def oldest_version(message: Group) -> int:
    """The oldest policy version that sampled a token of the group."""
    return min(min(memoryview(completion.versions).cast("i")) for completion in message.completions)
