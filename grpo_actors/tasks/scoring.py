"""Score the completions of a problem with every reward of a run.

This module decides which rewards run here and which in a process that can be killed. It does not apply weights: it
uses only their names and returns unweighted values. A reward that fails is reported and has no value for that group;
it never ends the process that scores.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from grpo_actors.config import Config
from grpo_actors.errors import RewardError
from grpo_actors.progress import report_progress
from grpo_actors.score import ACCURACY, REWARD
from grpo_actors.tasks.code_tests import CODE_TESTS, CodeLimits, CodeTests
from grpo_actors.tasks.library_rewards import LIBRARY_REWARDS, is_installed
from grpo_actors.tasks.own.functions import OwnFunctions, UsesOwnFunctions
from grpo_actors.tasks.own.kinds import is_own
from grpo_actors.tasks.rewards import REWARDS, Chat, Reward, built_in
from grpo_actors.tasks.task import Problem, Task


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


def weighted_reward(rewards: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Return the sum of the weighted rewards that apply; None if none of a weight other than 0 does.

    A reward without a weight counts 0. `objective.advantages` has the same rule for whole groups.
    """
    weighted = [
        weights[name] * value for name, value in rewards.items() if value is not None and weights.get(name)
    ]
    return sum(weighted) if weighted else None


def default_metric(weights: Mapping[str, float], task: Task) -> str:
    """Return what decides which checkpoint is best, if the settings do not say.

    The accuracy reads the answer as the built-in rewards and those of the task do. For any other reward it may always be
    0, so the weighted reward decides.
    """
    known = {*REWARDS, *task.default_rewards}
    return REWARD if any(weight and name not in known for name, weight in weights.items()) else ACCURACY


def open_scorer(config: Config) -> "Scorer":
    """Open the scorer of a run. Raises RewardError as `Scorer` does."""
    settings = config.reward
    limits = CodeLimits(settings.code_timeout_s, int(settings.code_memory_gb * 2**30))
    return Scorer(
        settings.functions,
        timeout_s=settings.reward_timeout_s,
        code=limits if settings.allow_code_execution else None,
        of_sources=config.rewards_of_sources,
    )


class Scorer(UsesOwnFunctions):
    """The rewards named in `weights`, ready to score. Threads must not share a scorer. Close it after use.

    Built-in rewards run here; `code_tests`, which needs the limits `code`, starts a process for each program.
    Own rewards (``file.py:function``, ``module:function``; a relative file is looked up from the current folder)
    and library rewards run in one child process and have `timeout_s` for each group.
    Raises RewardError if a name is unknown, a function cannot be loaded, or its library is missing.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        timeout_s: float,
        code: CodeLimits | None = None,
        of_sources: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """`of_sources`: source -> the rewards that apply to its problems; a source that is left out has all."""
        self._of_sources = of_sources or {}
        self._names = list(weights)
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
        applies = self._of_sources.get(problem.source, self._names)
        for name in self._names:
            if name not in applies:
                rewards[name] = [None] * len(completions)
                continue
            try:
                rewards[name] = self._values(name, arguments)
            except RewardError as error:
                rewards[name] = [None] * len(completions)
                failures.append(f"reward {name}, problem {problem.id}: {error}")
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
