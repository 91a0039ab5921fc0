"""The supply of problems: makes lease messages from problems, and groups from the answers. No socket.

What a group must look like is in `sampling_rules`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

from grpo_actors.errors import DataError, ProtocolError
from grpo_actors.learner.exchange.sampling_rules import SamplingRules
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.schedule.lease import Granted
from grpo_actors.schedule.mixture import MixtureOrder
from grpo_actors.schedule.order import ProblemOrder, sample_seeds
from grpo_actors.tasks.failures import ENVIRONMENT, summary
from grpo_actors.tasks.task import Problem
from grpo_actors.wire.messages import Group, Lease, ints

#: Tokenised prompts kept in the cache from lease to group: more than the leases open at a time.
CACHED_PROMPTS = 1024


@dataclass
class Supply:
    """The problems of a run, in order."""

    problems: Sequence[Problem]
    order: ProblemOrder | MixtureOrder
    seed: int
    num_generations: int
    max_prompt_length: int
    #: Messages -> token ids.
    encode_chat: Callable[[Sequence[Mapping[str, str]]], list[int]]
    rules: SamplingRules
    _encoded: Callable[[int], list[int]] = field(init=False)
    _excluded_in_a_row: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._encoded = lru_cache(CACHED_PROMPTS)(
            lambda index: self.encode_chat(self.problems[index].messages)
        )

    def problem(self, position: int) -> tuple[int, Problem]:
        """Return (epoch, problem) at a position of the order."""
        entry = self.order.at(position)
        return entry.epoch, self.problems[entry.index]

    def prompt(self, position: int) -> list[int]:
        """Return the token ids of the prompt at a position of the order."""
        return self._encoded(self.order.at(position).index)

    def exclusion_reason(self, position: int) -> str | None:
        """Return why the problem at a position is left out: its prompt is too long; None: it is not left out.

        Raises:
            DataError: all problems of an epoch are left out.
        """
        length = len(self.prompt(position))
        if length <= self.max_prompt_length:
            self._excluded_in_a_row = 0
            return None
        self._excluded_in_a_row += 1
        # Positions come in order: twice as many as there are problems contain a whole epoch, wherever they start.
        if self._excluded_in_a_row > 2 * len(self.problems):
            raise DataError(
                f"data.max_prompt_length: no problem has a prompt of at most {self.max_prompt_length} tokens; raise it"
            )
        _, problem = self.problem(position)
        return f"{problem.id} left out: {length} prompt tokens, data.max_prompt_length is {self.max_prompt_length}"

    def posed(self) -> Iterator[int]:
        """Yield the positions of the problems that a run poses, in its order. For a supply that serves nothing else."""
        return (position for position in count() if self.exclusion_reason(position) is None)

    def lease_message(self, granted: Granted) -> Lease:
        """Return the lease message for one grant."""
        epoch, problem = self.problem(granted.lease)
        return Lease(
            lease=granted.lease,
            attempt=granted.attempt,
            token=granted.token,
            min_version=granted.min_version,
            problem_id=problem.id,
            prompt=ints(self.prompt(granted.lease)),
            seeds=sample_seeds(self.seed, epoch, problem.id, self.num_generations),
            messages=list(problem.messages),
            answer=problem.answer,
            columns=json.dumps(dict(problem.columns)),  # type: ignore[arg-type]  # pydantic reads the text
            text_prompt=problem.text_prompt,
            mathematics=problem.mathematics,
            epoch=epoch,
            source=problem.source,
        )

    def read_group(self, message: Group, worker: str, newest_version: int) -> SampledGroup:
        """Read a group from its message, and check that it fits this run.

        Raises:
            ProtocolError: it does not fit; the text says why.
        """
        if len(message.completions) != self.num_generations:
            raise ProtocolError(
                f"a group has {self.num_generations} completions, got {len(message.completions)}"
            )
        completions = [SampledCompletion.read(completion) for completion in message.completions]
        for completion in completions:
            self.rules.check(completion, newest_version)
        epoch, problem = self.problem(message.lease)
        return SampledGroup(
            message.lease,
            epoch,
            problem,
            self.prompt(message.lease),
            worker,
            completions,
            failures=self._failures(message),
            logged=message.logged,
        )

    def _failures(self, message: Group) -> dict[str, str]:
        """Return the failures of this run's rewards and environment, without most of the traceback."""
        known = (*self.rules.rewards, ENVIRONMENT)
        return {name: summary(message.failures[name]) for name in known if name in message.failures}


def oldest_version(message: Group) -> int:
    """Return the oldest policy version that sampled a token of the group."""
    return min(min(memoryview(completion.versions).cast("i")) for completion in message.completions)
