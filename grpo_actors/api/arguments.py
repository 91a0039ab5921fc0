"""Turn what a program passes, data and functions as Python objects, into settings of a run."""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from grpo_actors.atomic import PRIVATE_FOLDER, UNFINISHED
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
            ConfigError: One is neither a name nor a function, or is given twice.
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
            name = reward if isinstance(reward, str) else self.add(reward, "reward", "rewards")
            if name in weights:
                raise ConfigError(
                    f"rewards: must be different ones, got {name} twice; give it a weight instead"
                )
            weights[name] = weight
        return weights


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return re.sub(r"\W+", "_", name).strip("_")  # <lambda>


def refuse_twice(given: Iterable[str], settings: Collection[str], aliases: Mapping[str, str]) -> None:
    """Refuse a setting that a call gives by its own name, too; `aliases` is argument -> setting.

    Raises:
        ConfigError: There is one.
    """
    for name in given:
        if aliases[name] in settings:
            raise ConfigError(
                f"argument: {name} and {aliases[name]} are one setting, given twice; keep one of them"
            )


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
    """Write rows to a file of JSON Lines in `folder`, which is made; return its path. Only this user may read it.

    The name follows from the content: the rows never replace others, be they those of a run or the user's own ``data.jsonl``.

    Raises:
        DataError: A row has no columns, or a value that JSON does not have.
        RunError: The file cannot be written.
    """
    digest = hashlib.blake2b(digest_size=6)
    with os_errors_in_one_line():
        folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(prefix=f"{argument}-", suffix=UNFINISHED, dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for _, row in plain_rows(rows, argument):
                    line = json.dumps(row).encode() + b"\n"
                    digest.update(line)
                    file.write(line)
            return Path(draft).rename(folder / f"{argument}-{digest.hexdigest()}.jsonl")
        except BaseException:
            Path(draft).unlink()
            raise
