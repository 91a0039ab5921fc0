"""What a reward logs while it scores, with TRL's two functions: ``log_extra(column, values)``, ``log_metric(name, value)``.

The process of the reward collects it, and the parent checks it once more, because that process runs unchecked code. What is
kept is small, and of types that every file and message has.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_actors.errors import RewardError

Value = str | bool | int | float | None

#: Longer names and texts are cut.
MAX_NAME_CHARACTERS = 100
MAX_VALUE_CHARACTERS = 1000
#: Of all rewards of a group together: columns, metrics, and values of one metric.
MAX_COLUMNS = 16
MAX_METRICS = 64
MAX_VALUES = 4096
#: Larger integers are kept as text: not every reader of JSON has them.
_MAX_INTEGER = 2**53


@dataclass(slots=True)
class Logs:
    """What the rewards of one group have logged. Its methods raise RewardError for what cannot be kept."""

    #: Completions of the group.
    count: int
    #: Column -> one value for each completion.
    extra: dict[str, list[Value]] = field(default_factory=dict)
    #: Metric -> every value that was logged.
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: object, values: Iterable[object]) -> None:
        """Keep a column of the recorded completions. It replaces an earlier one of the same name."""
        name = _cut(column, MAX_NAME_CHARACTERS)
        kept = [_plain(value) for value in values]
        if len(kept) != self.count:
            raise RewardError(
                f"log_extra: {name!r} must have a value for each of {self.count} completions, got {len(kept)}"
            )
        if name not in self.extra and len(self.extra) == MAX_COLUMNS:
            raise RewardError(f"log_extra: there may be {MAX_COLUMNS} columns, got {name!r} too")
        self.extra[name] = kept

    def log_metric(self, name: object, value: Any) -> None:
        """Keep a value of a metric. NaN and infinity, which have no place in a mean, are left out."""
        name = _cut(name, MAX_NAME_CHARACTERS)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise RewardError(f"log_metric: {name!r} must be a number, got {value!r:.100}") from None
        if not math.isfinite(number):
            return
        if name not in self.metrics and len(self.metrics) == MAX_METRICS:
            raise RewardError(f"log_metric: there may be {MAX_METRICS} names, got {name!r} too")
        values = self.metrics.setdefault(name, [])
        if len(values) == MAX_VALUES:
            raise RewardError(f"log_metric: {name!r} may have {MAX_VALUES} values for a group")
        values.append(number)

    def add(self, reply: Mapping[str, Any]) -> None:
        """Add what the reply of a reward's process holds (`as_reply`)."""
        for column, values in _table(reply, "extra"):
            self.log_extra(column, values)
        for name, numbers in _table(reply, "metrics"):
            for number in numbers:
                self.log_metric(name, number)

    def as_reply(self) -> dict[str, Any]:
        """Return what the process of a reward replies, next to the values; empty if nothing was logged."""
        return {name: table for name, table in (("extra", self.extra), ("metrics", self.metrics)) if table}


def _table(reply: Mapping[str, Any], name: str) -> Iterable[tuple[str, list[Any]]]:
    table = reply.get(name, {})
    if not isinstance(table, dict) or not all(isinstance(values, list) for values in table.values()):
        raise RewardError(f"its process replied with something else than lists as {name}")
    return table.items()


def _plain(value: Any) -> Value:
    """Return a value as it is kept: numbers, flags and None as they are, all others as text."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # of NumPy or PyTorch
    match value:
        case None | bool():
            return value
        case int() if abs(value) <= _MAX_INTEGER:
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
    return _cut(value, MAX_VALUE_CHARACTERS)


def _cut(value: object, characters: int) -> str:
    """Return the start of a text. What UTF-8 does not have, such as half a character, becomes a question mark."""
    return str(value)[:characters].encode(errors="replace").decode()
