"""Select and name the values of a run's records that are sent to a tracker. Pure; independent of any tracker."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_actors.observe.records import Record
from grpo_actors.observe.view import mapping, number, numbers

#: About how many samples a tracker gets of a whole run; completions.jsonl has all of them.
SAMPLES = 20
#: Topic -> the group of its plain numbers.
_GROUPS = {"metrics": "train", "eval": "eval"}
#: Numbers that give a record's position, not a measurement.
_POSITION_KEYS = ("seq", "time", "update", "total_updates")


def values(record: Record) -> dict[str, float]:
    """Return all finite numbers of a ``metrics`` or ``eval`` record by name.

    Names are ``train/loss``, ``train_rewards/correctness``, ``eval/accuracy``. Values that were not measured, or
    not finite, are left out.
    """
    group = _GROUPS[record["topic"]]
    found = {}
    for key, value in record.items():
        if key not in _POSITION_KEYS and (plain := number(record, key)) is not None:
            found[f"{group}/{key}"] = plain
        elif isinstance(value, Mapping):
            found |= {f"{group}_{key}/{name}": inner for name, inner in numbers(record, key).items()}
            # An estimate of each source of a mixture.
            inner = {name: number(mapping(value, name), "value") for name in value}
            found |= {f"{group}_{key}/{name}": plain for name, plain in inner.items() if plain is not None}
    return found


def is_shown(record: Record, total_updates: int | None) -> bool:
    """Return whether to send this ``sample``; it depends on the update only, so a resumed run chooses the same."""
    return bool(record["update"] % max(1, (total_updates or 0) // SAMPLES) == 0)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved settings by dotted name; lists and tables as JSON, unset settings left out."""
    return dict(_flat(config))


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, settings in config.items():
        for leaf, value in settings.items():
            if value is not None:
                plain = isinstance(value, bool | int | float | str)
                yield f"{section}.{leaf}", value if plain else json.dumps(value)


def markdown(sample: Record) -> str:
    """Format a problem and its completions; texts are fenced, because a model may write markup."""
    parts = [f"**{sample['problem']}**", fenced(sample["prompt"]), f"answer: `{sample['answer']}`"]
    for completion in sample["completions"]:
        cut = ", truncated" if completion["truncated"] else ""
        parts += [f"reward {completion['reward']}{cut}", fenced(completion["text"])]
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """Format preformatted text. The fence is longer than any inside it, so that a completion cannot close it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
