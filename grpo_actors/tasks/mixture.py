"""The task of several sources: their problems side by side, each judged by the task that it comes from."""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import accumulate
from typing import overload

from grpo_actors.errors import DataError
from grpo_actors.tasks.task import Problem, Task, fit, shared_prompts


class Mixture(Task):
    """The problems of tasks by the name of their source; "" is a source without a name.

    The two splits may have different sources. A name is the beginning of its problems' ids. Training prompts that are
    also held out are counted in a note.
    """

    #: The settings name the rewards: sources differ in what judges them.
    default_rewards: Mapping[str, float] = {}

    def __init__(self, train: Mapping[str, Task], held_out: Mapping[str, Task]) -> None:
        """Join the training problems of `train`, and the held-out problems of `held_out`."""
        self._tasks = {**held_out, **train}
        self._train = Joined({name: task.problems("train") for name, task in train.items()})
        self._held_out = Joined({name: task.problems("eval") for name, task in held_out.items()})
        super().__init__(self._train, self._held_out)
        self.notes = [note for task in self._tasks.values() for note in task.notes]
        if train is not held_out and (shared := self._shared_prompts()):
            self.notes.append(
                f"{shared} training prompts are also held out for evaluation: its scores are too high"
            )

    def leave_out(self, unfit: Callable[[Problem], bool]) -> int:
        """Leave out unfit training problems and return their number; an empty source is an error."""

        def in_source(name: str) -> Callable[[Problem], bool]:
            return lambda problem: unfit(named(name, problem))

        before = len(self._train)
        kept = {name: fit(problems, in_source(name)) for name, problems in self._train.sources.items()}
        if empty := [name for name, problems in kept.items() if not problems]:
            raise DataError(
                f"data.sources: {empty[0]!r} has no prompt that is short enough (data.max_prompt_length)"
            )
        self.splits["train"] = self._train = Joined(kept)
        return before - len(self._train)

    def digest(self) -> str:
        """Return a digest of the names and the training problems of all sources."""
        digests = {name: self._tasks[name].digest() for name in self._train.sources}
        return blake2b(json.dumps(digests).encode(), digest_size=8).hexdigest()

    def train_sources(self) -> Mapping[str, Sequence[Problem]]:
        """Return the training problems by the name of their source."""
        return self._train.sources

    def eval_sources(self) -> Mapping[str, Sequence[Problem]]:
        """Return the held-out problems by the name of their source."""
        return self._held_out.sources

    def _shared_prompts(self) -> int:
        """Return how often a prompt is on both sides; a task that makes its problems has its own held-out ones."""
        read = [p for p in self._train.sources.values() if isinstance(p, list)]
        return shared_prompts((problem for problems in read for problem in problems), self.splits["eval"])

    def is_correct(self, completion: str, problem: Problem) -> bool:
        """Return whether the completion's answer is right by the task of the problem's source."""
        return self._tasks[problem.source].is_correct(completion, problem)


def named(source: str, problem: Problem) -> Problem:
    """Return a problem as one of its source."""
    return replace(problem, id=f"{source}/{problem.id}", source=source) if source else problem


class Joined(Sequence[Problem]):
    """The problems of several sources, one after the other; each is made when it is accessed."""

    def __init__(self, sources: Mapping[str, Sequence[Problem]]) -> None:
        self.sources = dict(sources)
        self._starts = list(accumulate(map(len, sources.values()), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        positions = range(len(self))[index]  # raises IndexError, resolves negative numbers and slices
        if isinstance(positions, range):
            return [self[position] for position in positions]
        number = bisect_right(self._starts, positions) - 1
        name = list(self.sources)[number]
        return named(name, self.sources[name][positions - self._starts[number]])
