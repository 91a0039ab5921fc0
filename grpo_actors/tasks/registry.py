"""Every task by its name, and the settings that apply to all of them alike.

To add a task write one file with a class that has `task.Task`'s methods, and add one row to `TASKS`. A
task is imported only when it is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Protocol, overload

from grpo_actors.errors import DataError
from grpo_actors.tasks.task import Problem, Split, Task


class DataSettings(Protocol):
    """What a task may depend on: the configuration's [data] section, as far as tasks see it."""

    @property
    def task(self) -> str:
        """Key of `TASKS`."""

    @property
    def path(self) -> str:
        """File or folder of the data; empty: the task's own source."""

    @property
    def eval_path(self) -> str:
        """File to evaluate on; empty: the task's own choice."""

    @property
    def prompt_column(self) -> str:
        """Column with the prompt."""

    @property
    def answer_column(self) -> str:
        """Column with the true answer."""

    @property
    def system_prompt(self) -> str | None:
        """Replaces the task's own system prompt; empty: none at all; None: the task's own."""

    @property
    def num_shots(self) -> int:
        """Worked examples before each problem of GSM8K."""

    @property
    def max_train_samples(self) -> int:
        """Training problems used, the first ones; 0: all."""

    @property
    def eval_fraction(self) -> float:
        """Share of prompts held out where there is no other split."""

    @property
    def gym_task(self) -> str:
        """Name of a task of reasoning-gym."""

    @property
    def gym_settings(self) -> Mapping[str, Any]:
        """That task's own settings."""

    @property
    def gym_size(self) -> int:
        """Problems made to train on."""

    @property
    def gym_eval_size(self) -> int:
        """Problems made to evaluate on."""


def _arithmetic(_data: DataSettings, seed: int) -> Task:
    from grpo_actors.tasks.arithmetic import Arithmetic  # noqa: PLC0415

    return Arithmetic(seed=seed)


def _gsm8k(data: DataSettings, _seed: int) -> Task:
    from grpo_actors.tasks.gsm8k import Gsm8k  # noqa: PLC0415

    return Gsm8k(data.path, data.eval_path, num_shots=data.num_shots)


def _jsonl(data: DataSettings, _seed: int) -> Task:
    from grpo_actors.tasks.jsonl import Jsonl  # noqa: PLC0415

    return Jsonl(
        data.path,
        data.eval_path,
        prompt_column=data.prompt_column,
        answer_column=data.answer_column,
        eval_fraction=data.eval_fraction,
    )


def _reasoning_gym(data: DataSettings, seed: int) -> Task:
    from grpo_actors.tasks.reasoning_gym import ReasoningGym  # noqa: PLC0415

    return ReasoningGym(
        data.gym_task, data.gym_settings, seed=seed, size=data.gym_size, eval_size=data.gym_eval_size
    )


#: Name in the configuration -> how to make the task from the settings and the run's seed.
TASKS: Mapping[str, Callable[[DataSettings, int], Task]] = {
    "arithmetic": _arithmetic,
    "gsm8k": _gsm8k,
    "jsonl": _jsonl,
    "reasoning_gym": _reasoning_gym,
}


def load_task(data: DataSettings, *, seed: int) -> Task:
    """The task that the settings name, with its data read. Raises DataError where that is unusable.

    Equal settings and seed give equal problems, with equal ids, in every process.
    """
    if data.task not in TASKS:
        near = get_close_matches(data.task, TASKS, n=1)
        cure = f"did you mean {near[0]!r}?" if near else "choose one of those"
        raise DataError(f"data.task: must be one of {', '.join(TASKS)}, got {data.task!r}; {cure}")
    task = TASKS[data.task](data, seed)
    if data.system_prompt is None and not data.max_train_samples:
        return task
    return _Adjusted(task, data.system_prompt, data.max_train_samples)


def chosen_rewards(given: Mapping[str, float], task: Task) -> dict[str, float]:
    """Reward name -> weight: what the settings give, or the task's own where they give none."""
    return dict(given or task.default_rewards)


class _Adjusted:
    """A task with another system prompt, or with fewer training problems."""

    def __init__(self, task: Task, system_prompt: str | None, max_train_samples: int) -> None:
        self._task = task
        self.default_rewards = task.default_rewards
        train, held_out = task.problems("train"), task.problems("eval")
        train_count = min(len(train), max_train_samples or len(train))
        self._train = _Problems(train, train_count, system_prompt)
        self._eval = _Problems(held_out, len(held_out), system_prompt)

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split."""
        return self._train if split == "train" else self._eval

    def is_correct(self, completion: str, problem: Problem) -> bool:
        """The task's own judgement."""
        return self._task.is_correct(completion, problem)

    def answer_of(self, completion: str) -> str:
        """The task's own reading."""
        return self._task.answer_of(completion)


class _Problems(Sequence[Problem]):
    """The first `count` problems of a source, with another system prompt; made when asked for."""

    def __init__(self, source: Sequence[Problem], count: int, system_prompt: str | None) -> None:
        self._source = source
        self._count = count
        self._system_prompt = system_prompt

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        positions = range(self._count)[index]  # raises IndexError, resolves negative numbers and slices
        if isinstance(positions, range):
            return [self[position] for position in positions]
        problem = self._source[positions]
        return problem if self._system_prompt is None else _with_system_prompt(problem, self._system_prompt)


def _with_system_prompt(problem: Problem, text: str) -> Problem:
    others = tuple(message for message in problem.messages if message["role"] != "system")
    return replace(problem, messages=({"role": "system", "content": text}, *others) if text else others)
