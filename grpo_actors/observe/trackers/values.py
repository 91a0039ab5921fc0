"""What of a run's records a tracker is told, and by which names. Pure; knows no tracker."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_actors.observe.records import Record
from grpo_actors.observe.view import number, numbers

#: Samples shown of a whole run: a page is for looking, completions.jsonl has them all.
SAMPLES = 20
#: Topic -> the group that its plain numbers are in.
_GROUPS = {"metrics": "train", "eval": "eval"}
#: Numbers that say where a record stands, not what was measured.
_PLACES = ("seq", "time", "update", "total_updates")


def values(record: Record) -> dict[str, float]:
    """All finite numbers of a ``metrics`` or ``eval`` record: ``train/loss``, ``train_rewards/correctness``, ``eval/accuracy``.

    What was not measured, or was not finite, is left out.
    """
    group = _GROUPS[record["topic"]]
    told = {}
    for key, value in record.items():
        if key not in _PLACES and (plain := number(record, key)) is not None:
            told[f"{group}/{key}"] = plain
        elif isinstance(value, Mapping):
            told |= {f"{group}_{key}/{name}": inner for name, inner in numbers(record, key).items()}
    return told


def is_shown(record: Record, total_updates: int | None) -> bool:
    """Whether this ``sample`` is one of the few; by its update only, so that a resumed run chooses the same."""
    return bool(record["update"] % max(1, (total_updates or 0) // SAMPLES) == 0)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved settings by dotted name; a list or a table is its JSON, what is not set is left out."""
    return dict(_flat(config))


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, settings in config.items():
        for leaf, value in settings.items():
            if value is not None:
                plain = isinstance(value, bool | int | float | str)
                yield f"{section}.{leaf}", value if plain else json.dumps(value)


def markdown(sample: Record) -> str:
    """A problem and its completions; texts fenced, for a model may write markup."""
    parts = [f"**{sample['problem']}**", fenced(sample["prompt"]), f"answer: `{sample['answer']}`"]
    for completion in sample["completions"]:
        cut = ", truncated" if completion["truncated"] else ""
        parts += [f"reward {completion['reward']}{cut}", fenced(completion["text"])]
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """Preformatted text. The fence is longer than any within: a completion must not close it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
