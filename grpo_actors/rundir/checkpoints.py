"""Checkpoints as files: found, verified, marked, pruned. No model, no MLX: the supervisor reads them too.

A checkpoint is a folder that was renamed into place when it was whole; its manifest holds the size and
sha256 of every file. The newest one whose manifest verifies is the one to go on from.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_actors.atomic import UNFINISHED, discard_folder, seal_folder, whole_file
from grpo_actors.errors import RunError
from grpo_actors.rundir.folder import BEST, CHECKPOINT, MANIFEST, STATE, checkpoint_folder, update_of
from grpo_actors.schedule.lease import Cursor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One folder that was renamed into place, sound or not."""

    path: Path
    #: Updates behind it.
    update: int

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(path.stat().st_size for path in self.path.iterdir())


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint stores besides weights and optimizer."""

    cursor: Cursor
    #: Records told so far.
    records: int
    #: The recording that is replayed; empty: workers sample.
    recording: str = ""
    #: Problem id -> success rate, where there is a curriculum.
    success_rates: Mapping[str, float] = field(default_factory=dict)


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All whole-looking checkpoints of a run (renamed into place), oldest first."""
    found = filter(None, map(checkpoint_at, run_dir.glob(f"{CHECKPOINT}*")))
    return sorted(found, key=lambda checkpoint: checkpoint.update)


def checkpoint_at(path: Path) -> Checkpoint | None:
    """The folder as a checkpoint; None where it is none, or is being written."""
    update = update_of(path)
    return None if update is None or not (path / MANIFEST).is_file() else Checkpoint(path, update)


def newest_sound(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one that does not."""
    complaints: list[str] = []
    for checkpoint in reversed(find_checkpoints(run_dir)):
        complaint = verify(checkpoint)
        if complaint is None:
            return checkpoint, complaints
        complaints.append(complaint)
    return None, complaints


def verify(checkpoint: Checkpoint) -> str | None:
    """None if every file has the size and digest of the manifest; else what is wrong."""
    try:
        files = json.loads((checkpoint.path / MANIFEST).read_text())["files"]
        if STATE not in files:
            return f"{checkpoint.path}: its manifest does not list {STATE}"
        for name, expected in files.items():
            if _describe(checkpoint.path / name) != expected:
                return f"{checkpoint.path / name}: not the file that was written (size or sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The last two: the manifest is JSON of another shape, which a flipped bit can make it.
        return f"{checkpoint.path}: unreadable ({error!r})"
    return None


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint.path / STATE).read_text())
    return state


def mark_best(run_dir: Path, update: int, accuracy: float) -> None:
    """Remember which checkpoint scored best; `prune` keeps it."""
    with whole_file(run_dir / BEST, durable=True) as draft:
        name = checkpoint_folder(run_dir, update).name
        write_json(draft, {"checkpoint": name, "update": update, "accuracy": accuracy})


def best(run_dir: Path) -> dict[str, Any] | None:
    """{"checkpoint", "update", "accuracy"} of the best one; None before the first evaluation.

    Raises:
        RunError: the mark is unreadable, so that nobody knows which checkpoint must be kept.
    """
    path = run_dir / BEST
    try:
        marked: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(
            f"{path}: not JSON ({error}); remove it to let the next evaluation mark the best"
        ) from error
    return marked


def prune(run_dir: Path, keep: int, protected: frozenset[int]) -> None:
    """Remove all but the newest `keep` (at least 1), the best, and those in `protected` (not yet evaluated).

    What a kill during a write or a removal left behind goes too: only the writer of checkpoints may call this.
    """
    marked = best(run_dir)
    spared = protected | ({int(marked["update"])} if marked else set())
    for checkpoint in find_checkpoints(run_dir)[:-keep]:
        if checkpoint.update not in spared:
            discard_folder(checkpoint.path)
    for leftover in run_dir.glob(f"{CHECKPOINT}*{UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)


def seal(temporary: Path, final: Path) -> None:
    """Make a finished folder durable and give it its name: after this it is whole, before it is absent."""
    write_json(temporary / MANIFEST, {"files": {p.name: _describe(p) for p in sorted(temporary.iterdir())}})
    seal_folder(temporary, final)  # discards an unreadable one, which `newest_sound` went past


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n")
