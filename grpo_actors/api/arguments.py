"""Turn what a program passes, data and functions as Python objects, into settings of a run."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from grpo_actors.atomic import PRIVATE_FILE, PRIVATE_FOLDER, whole_file
from grpo_actors.errors import ConfigError, RewardError, os_errors_in_one_line
from grpo_actors.tasks.own.caller import CALLER
from grpo_actors.tasks.own.kinds import KINDS
from grpo_actors.tasks.own.loading import checked
from grpo_actors.tasks.rows import plain_rows

#: A path or hub id as in the settings, or rows with named columns: a list of dicts, a `datasets.Dataset`.
Data: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
#: A reward by its name in the settings, or a function that is called as TRL calls it.
Reward: TypeAlias = str | Callable[..., Any]
#: One reward, several, or each with its weight: a mapping of `Reward` to numbers.
Rewards: TypeAlias = Reward | Sequence[Reward] | Mapping[Any, float]


@dataclass
class Served:
    """The functions of the program that a run calls: name -> function."""

    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def add(self, function: Callable[..., Any], kind: str, argument: str) -> str:
        """Add a function; return its name in the settings.

        Raises:
            RewardError: It cannot be called as functions of that kind are; the text begins with the `argument`.
        """
        name = _name_of(function)
        number = 2
        unique = name
        while unique in self.functions and self.functions[unique] is not function:
            unique, number = f"{name}_{number}", number + 1
        try:
            self.functions[unique] = checked(function, name, KINDS[kind])
        except RewardError as error:
            raise RewardError(f"{argument}: {name} {error}") from None
        return f"{CALLER}:{unique}"

    def weights_of(self, rewards: Rewards) -> dict[str, float]:
        """Return reward name -> weight, 1 if none is given; add those that are functions.

        Raises:
            ConfigError: One is neither a name nor a function.
            RewardError: As `add`.
        """
        if isinstance(rewards, Mapping):
            pairs = list(rewards.items())
        elif isinstance(rewards, Sequence) and not isinstance(rewards, str):
            pairs = [(reward, 1.0) for reward in rewards]
        else:
            pairs = [(rewards, 1.0)]
        weights: dict[str, float] = {}
        for reward, weight in pairs:
            if not isinstance(reward, str) and not callable(reward):
                raise ConfigError(
                    f"rewards: must be names or functions, got {type(reward).__name__}; for weights write "
                    "{reward: weight}"
                )
            weights[reward if isinstance(reward, str) else self.add(reward, "reward", "rewards")] = weight
        return weights


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return re.sub(r"\W+", "_", name).strip("_")  # <lambda>


def is_place(data: Data) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether the data is a path or a hub id, not rows."""
    return isinstance(data, str | os.PathLike)


def as_rows(data: Data, argument: str) -> Iterable[Mapping[str, Any]]:
    """Return data that is no place, unchanged.

    Raises:
        ConfigError: It is no list of rows.
    """
    if isinstance(data, str | os.PathLike | Mapping) or not isinstance(data, Iterable):
        splits = f", such as {argument}[{next(iter(data))!r}]" if isinstance(data, Mapping) and data else ""
        raise ConfigError(
            f"{argument}: must be a path, a hub id, a list of dicts or one datasets.Dataset{splits}, "
            f"got {type(data).__name__}"
        )
    return data


def write_rows(rows: Iterable[Mapping[str, Any]], folder: Path, argument: str) -> Path:
    """Write rows to a file of JSON Lines in `folder`, which is made; return its path.

    The name follows from the content: other rows never replace those that a run has trained on.

    Raises:
        DataError: A row has no columns, or a value that JSON does not have.
        RunError: The file cannot be written.
    """
    digest = hashlib.blake2b(digest_size=6)
    with os_errors_in_one_line():
        folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        with whole_file(folder / f"{argument}.jsonl") as draft:
            draft.touch(PRIVATE_FILE)
            with draft.open("wb") as file:
                for _, row in plain_rows(rows, argument):
                    line = json.dumps(row).encode() + b"\n"
                    digest.update(line)
                    file.write(line)
        return (folder / f"{argument}.jsonl").rename(folder / f"{argument}-{digest.hexdigest()}.jsonl")
