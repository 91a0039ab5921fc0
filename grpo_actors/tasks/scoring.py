"""Scoring the completions of a problem with every reward of a run.

Knows which rewards are built in and which are a user's own; knows nothing of weights beyond which
names have one: values leave here unweighted, as facts. A reward that fails is reported and has no value
for that group; it never ends the process that scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own_reward import OwnRewards
from grpo_actors.tasks.rewards import REWARDS, Reward, built_in
from grpo_actors.tasks.task import Problem


@dataclass(frozen=True, slots=True)
class Scores:
    """What every reward said about the completions of one problem."""

    #: Reward name -> one value for each completion; None: not applicable, or the reward failed.
    rewards: dict[str, list[float | None]]
    #: One text for each reward that failed; its first line says where, what and why.
    failures: list[str]


class Scorer:
    """The rewards named in `weights`, ready to score. Not safe to share among threads.

    Built-in rewards run here. Own rewards (``file.py:function``, ``module:function``; a relative file is
    looked up from the current folder) run in one child process and have `timeout_s` for each group.
    Raises RewardError where a name is unknown or a function cannot be loaded. Close it after use.
    """

    def __init__(self, weights: Mapping[str, float], *, timeout_s: float) -> None:
        self._names = list(weights)
        own_names = [name for name in weights if name not in REWARDS and _is_own(name)]
        self._built_in: dict[str, Reward] = {
            name: built_in(name) for name in weights if name not in own_names
        }
        self._own_index = {name: index for index, name in enumerate(own_names)}
        self._own = OwnRewards(own_names, timeout_s=timeout_s) if own_names else None

    def score(self, problem: Problem, completions: Sequence[str]) -> Scores:
        """Every reward's values for completions of one problem, in the order of `completions`.

        Each column of the problem reaches a reward as a list that repeats it for each completion.
        """
        arguments = _arguments(problem, completions)
        rewards: dict[str, list[float | None]] = {}
        failures: list[str] = []
        for name in self._names:
            try:
                rewards[name] = self._values(name, arguments)
            except RewardError as error:
                rewards[name] = [None] * len(completions)
                failures.append(f"reward {name}, problem {problem.id}: {error}")
        return Scores(rewards, failures)

    def close(self) -> None:
        """End the child process of own rewards, if there is one."""
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _values(self, name: str, arguments: dict[str, Any]) -> list[float | None]:
        if name in self._built_in:
            return self._built_in[name](**arguments)
        assert self._own is not None
        return self._own.call(self._own_index[name], arguments)


def _is_own(name: str) -> bool:
    return ":" in name or name.endswith(".py")


def _arguments(problem: Problem, completions: Sequence[str]) -> dict[str, Any]:
    count = len(completions)
    columns = {name: [value] * count for name, value in problem.columns.items()}
    # Last, so that a column called "answer" or "prompts" cannot take the place of the real one.
    return columns | {
        "prompts": [list(problem.messages)] * count,
        "completions": [[{"role": "assistant", "content": text}] for text in completions],
        "answer": [problem.answer] * count,
    }
