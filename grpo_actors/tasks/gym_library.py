"""The only place that calls the library reasoning-gym: ``python -m grpo_actors.tasks.gym_library`` makes problems.

It never runs in a process that samples or trains. Problems are made in a child of their own, because some
of the library's generators follow the order of a set, which differs from process to process unless
PYTHONHASHSEED is given. Answers are scored where a user's own rewards run, because some scorers evaluate the
answer as an expression, and a completion is unchecked input.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS, create_dataset

from grpo_actors.errors import DataError, nearest
from grpo_actors.tasks.answers import extract_answer
from grpo_actors.tasks.rewards import Chat, text
from grpo_actors.tasks.time_limit import time_limit

#: What the library raises where it is given what it did not expect: settings out of bounds, an answer in no form
#: (the scorer of prime_factorization for one raises ValueError for any that is not all numbers).
REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)

#: Scoring an answer takes milliseconds; one that takes longer is worth nothing.
ANSWER_S = 1.0


def open_dataset(name: str, settings: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """The library's data set; DataError, in one line, for a name or a setting that it refuses."""
    _check_names(name, settings)
    given = dict(settings)
    try:
        if name == "composite":
            given["datasets"] = [DatasetSpec(**each) for each in given.get("datasets", [])]
        return create_dataset(name, **given, seed=seed, size=size)
    except REFUSALS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data.gym_settings: {name!r} refuses them: {said:.300}; got {settings}") from error


def _check_names(name: str, settings: Mapping[str, Any]) -> None:
    if name not in DATASETS:
        cure = nearest(name, DATASETS, count=3, otherwise=f"; there are {', '.join(sorted(DATASETS))}")
        raise DataError(f"data.gym_task: reasoning-gym has no task {name!r}{cure}")
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    for setting in settings:
        if setting in ("seed", "size"):
            raise DataError(
                f"data.gym_settings: may not have {setting!r}; set run.seed, data.gym_size, data.gym_eval_size"
            )
        if setting not in known:
            cure = nearest(setting, known, otherwise=f"; it has {', '.join(sorted(known)) or 'none'}")
            raise DataError(f"data.gym_settings: {name!r} has no setting {setting!r}{cure}")


def reasoning_gym(
    completions: Sequence[Chat], gym: Sequence[Mapping[str, Any]], **columns: Any
) -> list[float | None]:
    """The reward: the library's own score, 0 to 1, of the text in ``<answer>`` tags; 0 where there is none.

    Args:
        completions: Of one problem.
        gym: For each the problem as the task `ReasoningGym` hands it over: ``task``, ``settings``, ``entry``.
        columns: Not looked at.
    """
    del columns
    problem = gym[0]
    dataset = _scorer(problem["task"], json.dumps(problem["settings"]))
    entry = unpacked(problem["entry"])
    return [_score(dataset, extract_answer(text(completion)), entry) for completion in completions]


def _score(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    if not answer:
        return 0.0
    try:
        with time_limit(ANSWER_S):
            return float(dataset.score_answer(answer, entry))
    except (TimeoutError, *REFUSALS):
        return 0.0


@lru_cache(maxsize=1)
def _scorer(name: str, settings: str) -> Any:
    return open_dataset(name, json.loads(settings), seed=0, size=1)


def packed(value: Any) -> Any:
    """`value` as JSON has it, with what JSON lacks marked: some scorers compare with a tuple, or look up a number."""
    match value:
        case tuple():
            return {"tuple": [packed(item) for item in value]}
        case list():
            return [packed(item) for item in value]
        case dict():
            return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    return value


def unpacked(value: Any) -> Any:
    """What `packed` was given."""
    match value:
        case {"tuple": items}:
            return tuple(unpacked(item) for item in items)
        case {"dict": items}:
            return {unpacked(key): unpacked(item) for key, item in items}
        case list():
            return [unpacked(item) for item in value]
    return value


def _made(request: Mapping[str, Any]) -> dict[str, Any]:
    """For each of the requested ``ranges``, a first seed and a size, the entries: question, answer and all, packed."""
    entries = []
    try:
        for seed, size in request["ranges"]:
            dataset = open_dataset(request["task"], request["settings"], seed=seed, size=size)
            made = [dataset[index] for index in range(size)]
            entries.append(
                [{"question": e["question"], "answer": e["answer"], "entry": packed(e)} for e in made]
            )
    except DataError as error:
        return {"failure": str(error)}
    return {"entries": entries}


def main() -> None:
    """Answer one request, a line of JSON on standard input, by one on standard output."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a generator prints is for people
    json.dump(_made(json.loads(sys.stdin.readline())), reply)
    reply.close()


if __name__ == "__main__":
    main()
