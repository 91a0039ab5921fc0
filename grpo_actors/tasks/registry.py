"""Open the task that the settings name, and apply the settings that all tasks share.

The table of tasks is `config.data.TASKS`; `task.Task` is the interface of a task.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import overload

from grpo_actors.config import Config
from grpo_actors.config.data import TASKS, DataConfig, SourceConfig
from grpo_actors.tasks.mixture import Mixture
from grpo_actors.tasks.task import Problem, Task


def open_task(config: Config) -> Task:
    """Open the task of a run. Raises DataError if the data is unusable."""
    return load_task(config.data, seed=config.run.seed, eval_sources=config.evaluator.eval_sources)


def load_task(data: DataConfig, *, seed: int, eval_sources: Sequence[SourceConfig] = ()) -> Task:
    """Open the task that the settings name, or the mixture of tasks, and read its data.

    Equal settings and seed give equal problems with equal ids in every process.

    Args:
        data: Section [data].
        seed: That of the run.
        eval_sources: Sources of the held-out problems, in place of a part of the training data.

    Raises:
        DataError: The data is unusable.
    """
    if not data.sources and not eval_sources:
        return _load(data, seed)
    held_out = {source.name: _load_to_evaluate(data.of(source), seed) for source in eval_sources}
    train = {source.name: _load(data.of(source), seed, holds_out=not held_out) for source in data.sources}
    train = train or {"": _load(data, seed, holds_out=False)}
    return Mixture(train, held_out or train)


def _load_to_evaluate(data: DataConfig, seed: int) -> Task:
    """Open a task of which only the held-out problems are used: of a data set, all problems of its path."""
    task = _load(data, seed, holds_out=False)
    if not task.splits["eval"]:
        task.splits["eval"] = task.splits["train"]
    return task


def _load(data: DataConfig, seed: int, *, holds_out: bool = True) -> Task:
    """Open one task."""
    task_class = _class_of(data.task)
    given = {**dict(data), "seed": seed, "holds_out": holds_out}
    task = task_class(
        **{name: given[name] for name in inspect.signature(task_class).parameters if name in given}
    )
    if data.system_prompt is not None or data.max_train_samples or data.mathematics:
        train, held_out = task.splits["train"], task.splits["eval"]
        train_count = min(len(train), data.max_train_samples or len(train))
        chosen = (train, train_count), (held_out, len(held_out))
        task.splits["train"], task.splits["eval"] = (
            # What was read stays read; what a task makes is made when it is accessed.
            list(problems) if isinstance(source, list) else problems
            for source, count in chosen
            for problems in (_Problems(source, count, data),)
        )
    return task


def _class_of(task: str) -> type[Task]:
    found: type[Task] = resolve_name(f"{__package__}.{TASKS[task]}")
    return found


def rewards_of(config: Config) -> dict[str, float]:
    """Return reward name -> weight as `chosen_rewards`, without reading the data."""
    return dict(config.reward.functions or _class_of(config.data.task).default_rewards)


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
