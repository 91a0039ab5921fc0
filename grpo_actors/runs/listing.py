"""What there is to say about the run in a folder, from its files alone."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from grpo_actors.config import Config, read_config
from grpo_actors.errors import GrpoActorsError, ProtocolError
from grpo_actors.invocation import pasted
from grpo_actors.observe.records import Record, decode
from grpo_actors.observe.text import printable
from grpo_actors.observe.view import number
from grpo_actors.rundir.checkpoints import find_checkpoints, read_state
from grpo_actors.rundir.folder import CHECKPOINT, CONFIG_FILE, LOCK_FILE, METRICS_FILE, is_locked
from grpo_actors.rundir.outcome import continuing, gained

#: Folders below the given one that are searched, in levels: outputs/project/run.
LEVELS = 3
#: Bytes at the end of metrics.jsonl that are read. A record has some thousand.
TAIL_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class Listed:
    """One run."""

    folder: Path
    #: live, done, stopped, failed, or killed: it has left no word why it ended.
    state: str
    #: Unix seconds of the last sign of life.
    at: float
    update: int
    #: None if no record has told it.
    total_updates: int | None
    model: str
    task: str
    #: Base → best, or why there are no scores.
    score: str
    #: The command that continues it, or watches it while it is live; empty if nothing is left to do.
    next: str

    def lines(self) -> list[str]:
        """Return the run in a few lines."""
        total = f" of {self.total_updates}" if self.total_updates else ""
        when = datetime.fromtimestamp(self.at).astimezone().strftime("%Y-%m-%d %H:%M")
        about = f"{self.folder}  {self.state}, update {self.update}{total}, {when}"
        what = f"  {printable(self.model)} on {printable(self.task)}"
        verb = "watch:   " if self.state == "live" else "continue:"
        return [about, what, f"  {self.score}", *([f"  {verb} {self.next}"] if self.next else [])]

    def as_json(self) -> str:
        """Return one JSON object."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, default=str)


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run folders in `folder`, itself included, at most `LEVELS` below it; checkpoints are not entered."""
    depth = len(folder.parts)
    for path, folders, names in os.walk(folder):
        here = Path(path)
        if CONFIG_FILE in names and (METRICS_FILE in names or LOCK_FILE in names):
            yield here
            folders.clear()
        if len(here.parts) - depth >= LEVELS:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith((".", CHECKPOINT)))


def listed(run_dir: Path) -> Listed:
    """Read a run's files.

    Raises:
        ConfigError: the settings are unusable, as those of a newer version may be.
    """
    config = read_config(run_dir / CONFIG_FILE)
    last = _last_records(run_dir / METRICS_FILE)
    kept = find_checkpoints(run_dir)
    metrics, end = last.get("metrics"), last.get("stop")
    update = int(number(metrics, "update") or (kept[-1].update if kept else 0))
    total = number(metrics, "total_updates") or number(last.get("start"), "total_updates")
    total_updates = int(total) if total else config.learner.max_updates or None
    state = _state(run_dir, end, update, total_updates)
    newest = max((record["time"] for record in last.values()), default=None)
    return Listed(
        folder=run_dir,
        state=state,
        at=(run_dir / CONFIG_FILE).stat().st_mtime if newest is None else newest,
        update=update,
        total_updates=total_updates,
        model=config.model.model_name,
        task=config.data.title,
        score=_score(run_dir),
        next=""
        if state == "done"
        else pasted("watch", run_dir)
        if state == "live"
        else _resume(run_dir, config),
    )


def _state(run_dir: Path, end: Mapping[str, Any] | None, update: int, total: int | None) -> str:
    if is_locked(run_dir):
        return "live"
    if total is not None and update >= total:
        return "done"
    if end is None:
        return "killed"
    return "failed" if number(end, "exit_code") else "stopped"


def _score(run_dir: Path) -> str:
    try:
        return gained(run_dir)
    except GrpoActorsError as error:
        return str(error)


def _resume(run_dir: Path, config: Config) -> str:
    kept = find_checkpoints(run_dir)
    try:
        recording = read_state(kept[-1]).recording if kept else ""
    except GrpoActorsError:  # damaged: the run continues from an earlier checkpoint
        recording = ""
    if recording:
        return pasted("replay", recording, run_dir)
    # Relative to the folder in which the run was started, which may be another one.
    moved = Path(config.run.output_dir).resolve() != run_dir.resolve()
    return continuing(run_dir, config, *([f"output_dir={run_dir}"] if moved else []))


def _last_records(path: Path) -> dict[str, Record]:
    """Return topic -> its last record since the last start, among those at the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except FileNotFoundError:  # metrics.log_jsonl = false, or it has just started
        return {}
    found: dict[str, Record] = {}
    for line in lines:
        try:
            record = decode(line)
        except ProtocolError:  # half a line, at the start or because it is being written
            continue
        if record["topic"] == "start":
            found.pop("stop", None)
        found[record["topic"]] = record
    return found
