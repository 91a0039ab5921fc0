"""Hold the current state of a run, as a pure fold over its records: state and record in, state out.

No clock, file, socket or screen. Any prefix of a run's records gives a valid view; lost records make the
view older, never wrong.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_actors.observe.records import Record

#: Updates kept for the curves; a terminal is not wide enough for more.
CURVE_UPDATES = 2_000
#: Updates over which the pace is averaged: enough to even out pauses for evaluation.
PACE_UPDATES = 20
NOTES_KEPT = 5
#: Larger numbers are shown as unknown, so that sums of a curve's points stay finite.
LARGEST = 1e300
#: States in which a worker no longer takes part.
GONE = ("left", "lost")


class Point(NamedTuple):
    """One update on the curves; None: not measured."""

    update: float
    time: float
    reward: float | None
    loss: float | None
    length: float | None


@dataclass(frozen=True, slots=True)
class RunView:
    """The newest record of each topic, and the older records that are still shown."""

    seq: int = 0
    time: float | None = None
    start: Record | None = None
    stop: Record | None = None
    metrics: Record | None = None
    checkpoint: Record | None = None
    policy: Record | None = None
    sample: Record | None = None
    headcount: Record | None = None
    curve: tuple[Point, ...] = ()
    workers: Mapping[str, Record] = field(default_factory=lambda: MappingProxyType({}))
    #: All evaluations, in order of arrival; a run has few.
    evals: tuple[Record, ...] = ()
    #: The newest `NOTES_KEPT`, oldest first; likewise `logs`.
    alarms: tuple[Record, ...] = ()
    logs: tuple[Record, ...] = ()

    def apply(self, record: Record) -> "RunView":
        """Return the view after one more record; an unknown topic changes only number and time."""
        change = _CHANGES.get(record["topic"])
        view = change(self, record) if change else self
        return dataclasses.replace(view, seq=record["seq"], time=record["time"])

    @property
    def update(self) -> int:
        """Number of updates done."""
        return int(number(self.metrics, "update") or 0)

    @property
    def total_updates(self) -> int | None:
        """Number of updates planned; None if unknown."""
        total = number(self.metrics, "total_updates") or number(self.start, "total_updates")
        return int(total) if total else None

    @property
    def last_eval(self) -> Record | None:
        """The newest evaluation."""
        return self.evals[-1] if self.evals else None

    @property
    def best_eval(self) -> Record | None:
        """The newest evaluation that was the best so far when it arrived."""
        return next((record for record in reversed(self.evals) if record.get("best") is True), None)

    @property
    def updates_per_s(self) -> float | None:
        """Pace over the last `PACE_UPDATES` updates, by the times in the records."""
        recent = self.curve[-PACE_UPDATES - 1 :]
        if not recent or recent[-1].time <= recent[0].time:
            return None
        return (recent[-1].update - recent[0].update) / (recent[-1].time - recent[0].time)

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the planned end at the current pace; None if either is unknown."""
        if self.total_updates is None or not self.updates_per_s:
            return None
        return max(self.total_updates - self.update, 0) / self.updates_per_s


def number(record: Mapping[str, Any] | None, key: str) -> float | None:
    """Return the finite number at `key`, or None: a record from a socket may have any type there."""
    value = None if record is None else record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None


def numbers(record: Mapping[str, Any] | None, key: str) -> dict[str, float]:
    """Return the numbers of the mapping at `key` by name; leave out values that are not numbers."""
    value = mapping(record, key)
    return {str(name): x for name in value if (x := number(value, name)) is not None}


def mapping(record: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    """Return the mapping at `key`; empty if there is none."""
    value = None if record is None else record.get(key)
    return value if isinstance(value, Mapping) else {}


def _started(view: RunView, record: Record) -> RunView:
    """Clear everything at a first start; at a resume clear workers, pool size, alarms and the former end."""
    if record["seq"] == 1:
        return RunView(start=record)
    nobody: Mapping[str, Record] = MappingProxyType({})
    return dataclasses.replace(view, start=record, stop=None, workers=nobody, headcount=None, alarms=())


def _measured(view: RunView, record: Record) -> RunView:
    """Add one point. A resumed run repeats updates; they replace the former points and evaluations."""
    update = number(record, "update")
    if update is None:
        return view
    point = Point(
        update,
        record["time"],
        number(record, "reward_mean"),
        number(record, "loss"),
        number(record, "completion_length_mean"),
    )
    curve, evals = view.curve, view.evals
    if curve and update <= curve[-1].update:
        curve = tuple(old for old in curve if old.update < update)
        evals = tuple(old for old in evals if (number(old, "update") or 0) < update)
    return dataclasses.replace(view, metrics=record, curve=(*curve[-CURVE_UPDATES + 1 :], point), evals=evals)


def _reported(view: RunView, record: Record) -> RunView:
    workers = MappingProxyType({**view.workers, str(record.get("worker")): record})
    return dataclasses.replace(view, workers=workers)


def _sampled(view: RunView, record: Record) -> RunView:
    """Replace the sample if the record has texts; ``metrics.jsonl`` holds only its update and problem."""
    has_texts = isinstance(record.get("completions"), list) and record["completions"]
    return dataclasses.replace(view, sample=record) if has_texts else view


_CHANGES: Mapping[str, Callable[[RunView, Record], RunView]] = {
    "start": _started,
    "metrics": _measured,
    "worker": _reported,
    "eval": lambda view, record: dataclasses.replace(view, evals=(*view.evals, record)),
    "checkpoint": lambda view, record: dataclasses.replace(view, checkpoint=record),
    "policy": lambda view, record: dataclasses.replace(view, policy=record),
    "sample": _sampled,
    "headcount": lambda view, record: dataclasses.replace(view, headcount=record),
    "alarm": lambda view, record: dataclasses.replace(view, alarms=(*view.alarms, record)[-NOTES_KEPT:]),
    "log": lambda view, record: dataclasses.replace(view, logs=(*view.logs, record)[-NOTES_KEPT:]),
    "stop": lambda view, record: dataclasses.replace(view, stop=record),
}
