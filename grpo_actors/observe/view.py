"""What a run looks like now, as a pure fold over its records: state and record in, state out.

Knows no clock, file, socket or screen. Any prefix of a run's records gives a view; records that were
lost leave it older, never wrong.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_actors.observe.records import Record

#: Updates kept for the curves; a terminal is not wide enough for more.
CURVE_UPDATES = 2_000
#: Updates whose times give the pace: enough to even out pauses for evaluation.
PACE_UPDATES = 20
NOTES_KEPT = 5
#: Numbers beyond this are shown as unknown: sums of a curve's points stay finite.
LARGEST = 1e300
#: States in which a worker no longer takes part.
GONE = ("left", "lost")


class Point(NamedTuple):
    """One update on the curves; None where it was not measured."""

    update: float
    time: float
    reward: float | None
    loss: float | None
    length: float | None


@dataclass(frozen=True, slots=True)
class RunView:
    """The newest record of each kind, and what of the older ones is still shown."""

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
    #: In order of arrival; all of the run, which has few.
    evals: tuple[Record, ...] = ()
    #: The newest `NOTES_KEPT`, oldest first.
    alarms: tuple[Record, ...] = ()
    logs: tuple[Record, ...] = ()

    def apply(self, record: Record) -> "RunView":
        """The view after one more record; an unknown topic changes only number and time."""
        change = _CHANGES.get(record["topic"])
        view = change(self, record) if change else self
        return dataclasses.replace(view, seq=record["seq"], time=record["time"])

    @property
    def update(self) -> int:
        """Updates done."""
        return int(number(self.metrics, "update") or 0)

    @property
    def total_updates(self) -> int | None:
        """Updates planned, where that is known."""
        total = number(self.metrics, "total_updates") or number(self.start, "total_updates")
        return int(total) if total else None

    @property
    def last_eval(self) -> Record | None:
        """The newest evaluation."""
        return self.evals[-1] if self.evals else None

    @property
    def best_eval(self) -> Record | None:
        """The newest one that called itself the best so far."""
        return next((record for record in reversed(self.evals) if record.get("best") is True), None)

    @property
    def updates_per_s(self) -> float | None:
        """Pace of the last `PACE_UPDATES` updates, by the records' own times."""
        recent = self.curve[-PACE_UPDATES - 1 :]
        if len(recent) < 2 or recent[-1].time <= recent[0].time:
            return None
        return (recent[-1].update - recent[0].update) / (recent[-1].time - recent[0].time)

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the planned end at the present pace; None where either is unknown."""
        if self.total_updates is None or not self.updates_per_s:
            return None
        return max(self.total_updates - self.update, 0) / self.updates_per_s


def number(record: Mapping[str, Any] | None, key: str) -> float | None:
    """The finite number at `key`, or None: what came over a socket may have any type there."""
    value = None if record is None else record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None


def numbers(record: Mapping[str, Any] | None, key: str) -> dict[str, float]:
    """The numbers of the mapping at `key`, by name, without what is not one."""
    value = None if record is None else record.get(key)
    if not isinstance(value, Mapping):
        return {}
    return {str(name): x for name in value if (x := number(value, name)) is not None}


def _started(view: RunView, record: Record) -> RunView:
    """A first start forgets all; a resumed one forgets who was there and how the last one ended."""
    if record["seq"] == 1:
        return RunView(start=record)
    gone: Mapping[str, Record] = MappingProxyType({})
    return dataclasses.replace(view, start=record, stop=None, workers=gone, headcount=None, alarms=())


def _measured(view: RunView, record: Record) -> RunView:
    """One more point; a resumed run repeats updates, and what it repeats replaces what was."""
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
    """Metrics.jsonl has only a sample's place, not its texts: those of the one before stay."""
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
