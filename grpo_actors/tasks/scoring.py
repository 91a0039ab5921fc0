"""Score the completions of a problem with every reward of a run.

This module decides which rewards run here and which in a process that can be killed, and what each of them gets. It does
not apply weights: it uses only their names and returns unweighted values. A reward that fails is reported and has no
value for that group; it never ends the process that scores.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from grpo_actors.config import Config
from grpo_actors.errors import RewardError
from grpo_actors.progress import report_progress
from grpo_actors.score import ACCURACY, REWARD
from grpo_actors.tasks.code_tests import CODE_TESTS, TESTS_COLUMN, CodeLimits, CodeTests
from grpo_actors.tasks.columns import check_columns
from grpo_actors.tasks.library_rewards import LIBRARY_REWARDS, is_installed
from grpo_actors.tasks.own.functions import OwnFunctions, UsesOwnFunctions, place_of
from grpo_actors.tasks.own.kinds import is_own
from grpo_actors.tasks.own.logs import Logs
from grpo_actors.tasks.rewards import REWARDS, Chat, Reward, built_in, text
from grpo_actors.tasks.task import Message, Problem, Task

#: Arguments that an own reward gets besides the columns of the data.
GIVEN = (
    *("prompts", "completions", "completion_ids", "answer", "thoughts"),
    *("trainer_state", "log_extra", "log_metric"),
)
#: Columns that an own reward does not get, because TRL does not pass them.
NOT_PASSED = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True, slots=True)
class TrainerState:
    """How far the run is: what own rewards get as ``trainer_state``, with TRL's names."""

    #: Updates that the policy of the completions has done.
    global_step: int
    #: Planned updates; 0: unknown.
    max_steps: int = 0
    #: Passes over the data that were finished when the problem was posed.
    epoch: float = 0.0


@dataclass(frozen=True, slots=True)
class Scores:
    """The values of every reward for the completions of one problem."""

    #: Reward name -> one value for each completion; None if it does not apply or the reward failed.
    rewards: dict[str, list[float | None]]
    #: Reward that failed -> the reason in one line; a traceback may follow.
    failures: dict[str, str]
    #: What own rewards logged for the recorded completions and the metrics.
    logs: Logs = field(default_factory=lambda: Logs(0))


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
    and library rewards run in child processes, one for each folder, those of the program that started the run
    (``caller:function``) there. They have `timeout_s` for each group.
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
        #: Set it before `score`; whoever scores knows how far the run is.
        self.trainer_state = TrainerState(0)
        self._of_sources = of_sources or {}
        self._names = list(weights)
        #: Reward name -> seconds that it has taken so far.
        self.seconds: dict[str, float] = dict.fromkeys(weights, 0.0)
        specs = {name: _spec(name) for name in weights if name in LIBRARY_REWARDS or _is_own(name)}
        self._here: dict[str, Reward] = {
            name: _runs_here(name, code) for name in weights if name not in specs
        }
        places = {name: place_of(spec) for name, spec in specs.items()}
        #: Reward -> the functions of its place, and its index there.
        self._there: dict[str, tuple[OwnFunctions, int]] = {}
        with ExitStack() as opened:
            for place in dict.fromkeys(places.values()):
                names = [name for name in specs if places[name] == place]
                functions = OwnFunctions([specs[name] for name in names], "reward", timeout_s=timeout_s)
                opened.push(functions)
                self._there |= {name: (functions, index) for index, name in enumerate(names)}
            opened.pop_all()
        self._own = list(dict.fromkeys(functions for functions, _ in self._there.values()))

    def score(
        self,
        problem: Problem,
        completions: Sequence[str | Chat],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        thoughts: Sequence[str | None] | None = None,
    ) -> Scores:
        """Return the values of every reward for completions of one problem, in the order of `completions`.

        Args:
            problem: The problem.
            completions: Chats that end with the assistant's last turn, or the texts of that turn alone.
            completion_ids: The tokens of each completion; None: own rewards get none.
            thoughts: The texts of their thinking, None for each without; None: none has any.
        """
        chats = [_chat(completion) for completion in completions]
        thoughts = thoughts or [None] * len(chats)
        ours = _our_arguments(problem, chats, thoughts)
        theirs = _own_arguments(problem, chats, completion_ids, thoughts, self.trainer_state)
        rewards: dict[str, list[float | None]] = {}
        failures: dict[str, str] = {}
        logs = Logs(len(completions))
        for name in self._names:
            if not self._applies(name, problem.source):
                rewards[name] = [None] * len(completions)
                continue
            started_s = time.monotonic()
            try:
                rewards[name] = self._values(name, theirs if _is_own(name) else ours, logs)
            except RewardError as error:
                rewards[name] = [None] * len(completions)
                failures[name] = str(error)
            self.seconds[name] += time.monotonic() - started_s
            report_progress()
        return Scores(rewards, failures, logs)

    def _values(self, name: str, arguments: dict[str, Any], logs: Logs) -> list[float | None]:
        if name in self._here:
            return self._here[name](**arguments)
        functions, index = self._there[name]
        values: list[float | None] = functions.call(index, arguments, logs)
        return values

    def needs(self) -> dict[str, list[str]]:
        """Return reward -> columns without which it cannot be computed; a reward that needs none is left out."""
        needs = {
            name: [argument for argument in functions.requires(index) if argument not in GIVEN]
            for name, (functions, index) in self._there.items()
        }
        if CODE_TESTS in self._here:
            needs[CODE_TESTS] = [TESTS_COLUMN]
        return {name: columns for name, columns in needs.items() if columns}

    def check_columns(self, task: Task) -> None:
        """Check that the problems have these columns; raise RewardError if not."""
        check_columns(self.needs(), task, "reward.functions", applies=self._applies)

    def _applies(self, name: str, source: str) -> bool:
        return name in self._of_sources.get(source, self._names)


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


def _chat(completion: str | Chat) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)


def _our_arguments(problem: Problem, chats: Sequence[Chat], thoughts: Sequence[str | None]) -> dict[str, Any]:
    """Return the arguments of this package's rewards: chats, and the true answer as text."""
    columns = {name: [value] * len(chats) for name, value in problem.columns.items()}
    # These come last, so that a column named "answer" or "prompts" cannot replace the real one.
    return columns | {
        "prompts": [list(problem.messages)] * len(chats),
        "completions": chats,
        "answer": [problem.answer] * len(chats),
        "mathematics": [problem.mathematics] * len(chats),
        "thoughts": list(thoughts),
    }


def _own_arguments(
    problem: Problem,
    chats: Sequence[Chat],
    completion_ids: Sequence[Sequence[int]] | None,
    thoughts: Sequence[str | None],
    state: TrainerState,
) -> dict[str, Any]:
    """Return the arguments of a user's reward, those of TRL's: a column keeps its name and its values.

    If the prompts of the data are texts, prompts and completions are texts: the user's turn and the last turn.
    """
    count = len(chats)
    columns = {"answer": problem.answer, **problem.columns}
    as_text = problem.text_prompt
    prompt = problem.messages[-1]["content"] if as_text else list(problem.messages)
    arguments: dict[str, Any] = {
        name: [value] * count for name, value in columns.items() if name not in NOT_PASSED
    }
    arguments |= {
        "prompts": [prompt] * count,
        "completions": [text(chat) for chat in chats] if as_text else chats,
        "thoughts": list(thoughts),
        "trainer_state": asdict(state),
        # The child makes the functions.
        "log_extra": None,
        "log_metric": None,
    }
    return (
        arguments if completion_ids is None else arguments | {"completion_ids": [*map(list, completion_ids)]}
    )
