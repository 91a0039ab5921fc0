"""Feed the records of a run's file to one tracker, each step once.

A restarted process reads its position from ``trackers/NAME.json``. A resumed run records the updates after its
checkpoint again: a tracker that can discard the first values does so; in any other tracker the first values stay.
A process that is killed after sending a step and before saving its position may send that step twice; each tracker
overwrites or drops it as it can.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from grpo_actors.atomic import PRIVATE_FOLDER, write_whole
from grpo_actors.observe.follow import HistoryReader
from grpo_actors.observe.reading import Reading
from grpo_actors.observe.records import Record
from grpo_actors.rundir.folder import TRACKERS_FOLDER
from grpo_actors.rundir.reading import STRICT
from grpo_actors.trackers import TrackedRun, Tracker, open_tracker
from grpo_actors.trackers.values import hyperparameters, is_shown, values


@dataclass
class Position(Reading):
    """A tracker's position in a run: what has been read and sent."""

    run_id: str = ""
    #: Topic -> newest update sent.
    updates: dict[str, int] = field(default_factory=dict)

    __pydantic_config__ = STRICT

    def has_sent(self, record: Record) -> bool:
        """Return whether the tracker already has this topic's values of this update."""
        return bool(record["update"] <= self.updates.get(record["topic"], -1))

    def back_to(self, update: int) -> None:
        """Go back to `update`, after the tracker has discarded later steps."""
        self.updates = {topic: min(given, update) for topic, given in self.updates.items()}


_position = TypeAdapter(Position)


class Feed:
    """The transfer from one run to one tracker: call `catch_up` periodically until `ended`."""

    #: Whether the newest record read is the run's ``stop``.
    ended: bool = False

    def __init__(self, run_dir: Path, name: str) -> None:
        """Prepare to feed the run in `run_dir` to the tracker `name`, which is opened at the ``start`` record."""
        self._run_dir = run_dir
        self._name = name
        self._file = run_dir / TRACKERS_FOLDER / f"{name}.json"
        self._reader = HistoryReader(run_dir)
        self._position = Position()
        self._tracker: Tracker | None = None
        self._total_updates: int | None = None

    def catch_up(self) -> None:
        """Send the tracker all new records of the file, and save the position."""
        read = False
        while (record := self._reader.read()) is not None:
            self._take(record)
            read = True
        if read and self._tracker is not None:
            self._tracker.flush()
            self._save()

    def close(self) -> None:
        """Close the tracker and the files; may be called twice."""
        self._reader.close()
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close()

    def _take(self, record: Record) -> None:
        topic = record["topic"]
        self.ended = topic == "stop"
        if topic == "start" and record["run_id"] != self._position.run_id:
            self._open(record)
        if self._tracker is None or not self._position.is_new(record):
            return
        self._position.mark(record)
        if topic == "start" and self._tracker.discard_after(record["update"]):
            self._position.back_to(record["update"])
        elif topic in ("metrics", "eval", "sample") and not self._position.has_sent(record):
            self._send(self._tracker, record)

    def _send(self, tracker: Tracker, record: Record) -> None:
        if record["topic"] != "sample":
            tracker.log(record["update"], record["time"], values(record))
        elif "completions" not in record or not is_shown(record, self._total_updates):
            return
        else:
            tracker.log_sample(record["update"], record["time"], record)
        self._position.updates[record["topic"]] = record["update"]

    def _open(self, start: Record) -> None:
        if self._tracker is not None:  # a new run has replaced the former one in the folder
            self._tracker.close()
        self._file.parent.mkdir(PRIVATE_FOLDER, exist_ok=True)  # before the tracker makes it for everybody
        self._position = self._load(start["run_id"])
        self._total_updates = start["total_updates"]
        self._tracker = open_tracker(
            self._name,
            TrackedRun(
                folder=self._file.with_suffix(""),
                name=start["run_name"],
                run_id=start["run_id"],
                started=start["time"],
                hyperparameters=hyperparameters(start["config"]),
                sent_update=self._position.updates.get("metrics"),
            ),
        )

    def _load(self, run_id: str) -> Position:
        """Load the tracker's position in the run `run_id`; the start if none, or another run's, is saved."""
        try:
            position = _position.validate_json(self._file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return Position(run_id=run_id)
        return position if position.run_id == run_id else Position(run_id=run_id)

    def _save(self) -> None:
        write_whole(self._file, json.dumps(asdict(self._position)) + "\n")
