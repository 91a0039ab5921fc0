"""Call the library reasoning-gym; ``python -m grpo_actors.tasks.gym_library`` makes problems.

This is the only module that imports the library, and it never runs in a process that samples or trains. Problems are
made in a separate child process, because some generators of the library depend on the order of a set, which differs
between processes unless PYTHONHASHSEED is set. Answers are scored in the process of a user's own rewards, because
some scorers evaluate the answer as an expression, and a completion is unchecked input.
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
from grpo_actors.time_limit import time_limit

#: Errors that the library raises for unexpected input: settings out of bounds, or an answer in the wrong form
#: (for example, the scorer of prime_factorization raises ValueError if an answer is not all numbers).
LIBRARY_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)

#: Scoring an answer takes milliseconds; an answer that takes longer scores 0.
ANSWER_S = 1.0


def open_dataset(name: str, settings: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """Open a data set of the library; raise a DataError of one line for a name or a setting that it rejects."""
    _check_names(name, settings)
    given = dict(settings)
    try:
        if name == "composite":
            given["datasets"] = [DatasetSpec(**each) for each in given.get("datasets", [])]
        return create_dataset(name, **given, seed=seed, size=size)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data.gym_settings: {name!r} refuses them: {reason:.300}; got {settings}") from error


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
    """Return the reward: the library's own score, 0 to 1, of the text in ``<answer>`` tags; 0 if there is none.

    Args:
        completions: Completions of one problem.
        gym: For each completion the problem as given by the task `ReasoningGym`: ``task``, ``settings``, ``entry``.
        columns: Not used.
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
    except (TimeoutError, *LIBRARY_ERRORS):
        return 0.0


@lru_cache(maxsize=1)
def _scorer(name: str, settings: str) -> Any:
    return open_dataset(name, json.loads(settings), seed=0, size=1)


def packed(value: Any) -> Any:
    """Encode `value` for JSON, marking tuples and dicts: some scorers compare with a tuple or look up a number."""
    match value:
        case tuple():
            return {"tuple": [packed(item) for item in value]}
        case list():
            return [packed(item) for item in value]
        case dict():
            return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    return value


def unpacked(value: Any) -> Any:
    """Return the value that `packed` encoded."""
    match value:
        case {"tuple": items}:
            return tuple(unpacked(item) for item in items)
        case {"dict": items}:
            return {unpacked(key): unpacked(item) for key, item in items}
        case list():
            return [unpacked(item) for item in value]
    return value


def _make_entries(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make the entries of each requested range (first seed, size): question, answer and the whole entry, packed."""
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
    """Read one request, a line of JSON, from standard input, and write the reply to standard output."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that a generator prints goes to the terminal
    json.dump(_make_entries(json.loads(sys.stdin.readline())), reply)
    reply.close()


if __name__ == "__main__":
    main()
