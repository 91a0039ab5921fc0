"""Open the task that the settings name, and apply the settings that all tasks share.

The table of tasks is `config.data.TASKS`; `task.Task` is the interface of a task.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import overload

from grpo_actors.config.data import TASKS, DataConfig
from grpo_actors.tasks.task import Problem, Task


def load_task(data: DataConfig, *, seed: int) -> Task:
    """Open the task that the settings name, and read its data. Raises DataError if the data is unusable.

    Equal settings and seed give equal problems with equal ids in every process.
    """
    task_class = resolve_name(f"{__package__}.{TASKS[data.task]}")
    given = {**dict(data), "seed": seed}
    task: Task = task_class(
        **{name: given[name] for name in inspect.signature(task_class).parameters if name in given}
    )
    if data.system_prompt is not None or data.max_train_samples or data.mathematics:
        train, held_out = task.splits["train"], task.splits["eval"]
        train_count = min(len(train), data.max_train_samples or len(train))
        task.splits["train"] = _Problems(train, train_count, data)
        task.splits["eval"] = _Problems(held_out, len(held_out), data)
    return task


def chosen_rewards(given: Mapping[str, float], task: Task) -> dict[str, float]:
    """Return reward name -> weight: those of the settings, or those of the task if the settings have none."""
    return dict(given or task.default_rewards)


class _Problems(Sequence[Problem]):
    """The first `count` problems of a source, with the settings that all tasks share; each is made when it is accessed."""

    def __init__(self, source: Sequence[Problem], count: int, data: DataConfig) -> None:
        self._source = source
        self._count = count
        self._system_prompt = data.system_prompt
        self._mathematics = data.mathematics

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
        if self._mathematics:
            problem = replace(problem, mathematics=True)
        return problem if self._system_prompt is None else _with_system_prompt(problem, self._system_prompt)


def _with_system_prompt(problem: Problem, text: str) -> Problem:
    others = tuple(message for message in problem.messages if message["role"] != "system")
    return replace(problem, messages=({"role": "system", "content": text}, *others) if text else others)
