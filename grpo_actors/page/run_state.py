"""The state of one run for the page: a fold over its records, like `observe.view`, with whole curves and all alarms.

Pure: no file, no clock, no figure.
"""

from collections import deque
from collections.abc import Iterator

from grpo_actors.observe.records import Record
from grpo_actors.observe.view import RunView, number, numbers
from grpo_actors.page.curves import Curves
from grpo_actors.page.timeline import Timeline, memory_of

#: Alarms and log lines kept.
NOTES_KEPT = 200
#: Fields of `metrics` that are the position of a row, not a curve.
_POSITION = ("update", "total_updates", "seq", "time")
#: Fields of `metrics` that are numbers by name: each name is a curve, ``rewards/correctness``.
_BY_NAME = ("rewards", "reward_by_source", "logprob_gaps", "reward_failures")


class RunState:
    """What the page shows of one run."""

    def __init__(self) -> None:
        self.view = RunView()
        self.curves = Curves()
        self.timeline = Timeline()
        self.alarms: deque[Record] = deque(maxlen=NOTES_KEPT)
        self.logs: deque[Record] = deque(maxlen=NOTES_KEPT)
        #: Records applied so far; rises also when a resumed run repeats numbers.
        self.applied = 0

    def apply(self, record: Record) -> None:
        """Add one record."""
        self.applied += 1
        self.view = self.view.apply(record)
        self.timeline.apply(record)
        match record["topic"]:
            case "start" if record["seq"] == 1:
                self.curves, self.timeline = Curves(), Timeline()
                self.alarms.clear()
                self.logs.clear()
            case "metrics" if (update := number(record, "update")) is not None:
                self.curves.append(update, dict(_values(record)))
            case "alarm":
                self.alarms.append(record)
            case "log":
                self.logs.append(record)


def _values(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a ``metrics`` record by curve."""
    for name in record:
        if name not in _POSITION and (value := number(record, name)) is not None:
            yield name, value
    for field in _BY_NAME:
        for name, value in numbers(record, field).items():
            yield f"{field}/{name}", value
    for name, value in memory_of(record).items():
        yield f"memory/{name}", value
    groups = {float(key): count for key, count in numbers(record, "staleness").items() if key.isdecimal()}
    if total := sum(groups.values()):
        yield "staleness_mean", sum(key * count for key, count in groups.items()) / total
    mean, deviation = number(record, "reward_mean"), number(record, "reward_std")
    if mean is not None and deviation is not None:
        yield "reward_low", mean - deviation
        yield "reward_high", mean + deviation
