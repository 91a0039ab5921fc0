"""Score the completions of a problem with every reward of a run.

This module decides which rewards run here and which in a process that can be killed. It does not apply weights: it
uses only their names and returns unweighted values. A reward that fails is reported and has no value for that group;
it never ends the process that scores.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from grpo_actors.config.data import RewardConfig
from grpo_actors.errors import RewardError
from grpo_actors.progress import report_progress
from grpo_actors.tasks.code_tests import CODE_TESTS, CodeLimits, CodeTests
from grpo_actors.tasks.library_rewards import LIBRARY_REWARDS, is_installed
from grpo_actors.tasks.own.functions import OwnFunctions, UsesOwnFunctions
from grpo_actors.tasks.own.kinds import is_own
from grpo_actors.tasks.rewards import REWARDS, Chat, Reward, built_in
from grpo_actors.tasks.task import Problem


@dataclass(frozen=True, slots=True)
class Scores:
    """The values of every reward for the completions of one problem."""

    #: Reward name -> one value for each completion; None if it does not apply or the reward failed.
    rewards: dict[str, list[float | None]]
    #: One text for each reward that failed; its first line gives the reward, the problem and the reason.
    failures: list[str]


def reward_means(completions: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Return the unweighted mean of each reward over the completions with a value; a reward without any is left out."""
    values: dict[str, list[float]] = {}
    for rewards in completions:
        for name, value in rewards.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: fmean(given) for name, given in values.items()}


def open_scorer(weights: Mapping[str, float], settings: RewardConfig) -> "Scorer":
    """Open the scorer of a run. Raises RewardError as `Scorer` does."""
    limits = CodeLimits(settings.code_timeout_s, int(settings.code_memory_gb * 2**30))
    return Scorer(
        weights, timeout_s=settings.reward_timeout_s, code=limits if settings.allow_code_execution else None
    )


class Scorer(UsesOwnFunctions):
    """The rewards named in `weights`, ready to score. Threads must not share a scorer. Close it after use.

    Built-in rewards run here; `code_tests`, which needs the limits `code`, starts a process for each program.
    Own rewards (``file.py:function``, ``module:function``; a relative file is looked up from the current folder)
    and library rewards run in one child process and have `timeout_s` for each group.
    Raises RewardError if a name is unknown, a function cannot be loaded, or its library is missing.
    """

    def __init__(
        self, weights: Mapping[str, float], *, timeout_s: float, code: CodeLimits | None = None
    ) -> None:
        self._names = list(weights)
        #: Reward name -> seconds that it has taken so far.
        self.seconds: dict[str, float] = dict.fromkeys(weights, 0.0)
        specs = {name: _spec(name) for name in weights if name in LIBRARY_REWARDS or _is_own(name)}
        self._here: dict[str, Reward] = {
            name: _runs_here(name, code) for name in weights if name not in specs
        }
        self._own_index = {name: index for index, name in enumerate(specs)}
        self._own = OwnFunctions(list(specs.values()), "reward", timeout_s=timeout_s) if specs else None

    def score(self, problem: Problem, completions: Sequence[str | Chat]) -> Scores:
        """Return the values of every reward for completions of one problem, in the order of `completions`.

        A completion is a chat that ends with the assistant's last turn, or the text of that turn alone.
        A reward gets each column of the problem as a list that repeats it for each completion.
        """
        arguments = _arguments(problem, completions)
        rewards: dict[str, list[float | None]] = {}
        failures: list[str] = []
        for name in self._names:
            started_s = time.monotonic()
            try:
                rewards[name] = self._values(name, arguments)
            except RewardError as error:
                rewards[name] = [None] * len(completions)
                failures.append(f"reward {name}, problem {problem.id}: {error}")
            self.seconds[name] += time.monotonic() - started_s
            report_progress()
        return Scores(rewards, failures)

    def _values(self, name: str, arguments: dict[str, Any]) -> list[float | None]:
        if name in self._here:
            return self._here[name](**arguments)
        assert self._own is not None
        values: list[float | None] = self._own.call(self._own_index[name], arguments)
        return values


def _is_own(name: str) -> bool:
    return name not in REWARDS and is_own(name)


def _spec(name: str) -> str:
    """Return the location of a reward's function for the child process."""
    if name not in LIBRARY_REWARDS:
        return name
    if not is_installed(name):
        raise RewardError(f"reward.functions: {name!r} {LIBRARY_REWARDS[name].cure}")
    return LIBRARY_REWARDS[name].spec


def _runs_here(name: str, code: CodeLimits | None) -> Reward:
    if name != CODE_TESTS:
        return built_in(name, [CODE_TESTS, *LIBRARY_REWARDS])
    if code is None:
        raise RewardError(
            f"reward.functions: {CODE_TESTS!r} runs code that the model wrote and is off; docs/tasks.md says what "
            "it does not protect from; then set reward.allow_code_execution = true"
        )
    return CodeTests(code)


def _arguments(problem: Problem, completions: Sequence[str | Chat]) -> dict[str, Any]:
    count = len(completions)
    columns = {name: [value] * count for name, value in problem.columns.items()}
    # These come last, so that a column named "answer" or "prompts" cannot replace the real one.
    return columns | {
        "prompts": [list(problem.messages)] * count,
        "completions": [
            [{"role": "assistant", "content": given}] if isinstance(given, str) else list(given)
            for given in completions
        ],
        "answer": [problem.answer] * count,
    }
