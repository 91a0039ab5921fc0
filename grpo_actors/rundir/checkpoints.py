"""Find, verify, mark and prune checkpoints as files. Loads no model and no MLX, because the supervisor reads them too.

A checkpoint is a folder that was renamed into place when it was complete. Its manifest holds the size and
sha256 of every file. A run continues from the newest checkpoint that verifies.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_actors.atomic import UNFINISHED, discard_folder, seal_folder, whole_file
from grpo_actors.errors import RunError
from grpo_actors.failpoints import reach
from grpo_actors.rundir.folder import (
    BEST,
    CHECKPOINT,
    MANIFEST,
    OPTIMIZER,
    REFERENCE,
    STATE,
    checkpoint_folder,
    update_of,
)
from grpo_actors.schedule.lease import Cursor

#: Files that are verified at the same time.
_VERIFYING_THREADS = 4


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder that was renamed into place. Its files may be damaged; see `verify`."""

    path: Path
    #: Number of updates done when it was written.
    update: int

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum(path.stat().st_size for path in self.path.iterdir())


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The part of a run's state that a checkpoint stores besides weights and optimizer."""

    cursor: Cursor
    #: Number of records published so far.
    records: int
    #: Path of the recording that is replayed; empty if workers sample.
    recording: str = ""
    #: Problem id -> success rate; empty without a curriculum.
    success_rates: Mapping[str, float] = field(default_factory=dict)


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Return all checkpoints of a run that were renamed into place, oldest first. None is verified."""
    found = filter(None, map(checkpoint_at, run_dir.glob(f"{CHECKPOINT}*")))
    return sorted(found, key=lambda checkpoint: checkpoint.update)


def checkpoint_at(path: Path) -> Checkpoint | None:
    """Return the folder as a checkpoint; None if it is no checkpoint or is still being written."""
    update = update_of(path)
    return None if update is None or not (path / MANIFEST).is_file() else Checkpoint(path, update)


def newest_sound(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint from which a run can continue, and a line about the fault of each newer one."""
    faults: list[str] = []
    for checkpoint in reversed(find_checkpoints(run_dir)):
        fault = verify(checkpoint, to_resume=True)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    return None, faults


def verify(checkpoint: Checkpoint, *, to_resume: bool = False) -> str | None:
    """Return None if the files have the size and digest of the manifest, else a line that says what is wrong.

    Args:
        checkpoint: The checkpoint.
        to_resume: Whether a run continues from it. Otherwise the optimizer's state, which is several times as large
            as the weights, and the reference are not read.
    """
    try:
        files = json.loads((checkpoint.path / MANIFEST).read_text())["files"]
        if STATE not in files:
            return f"{checkpoint.path}: its manifest does not list {STATE}"
        names = [name for name in files if to_resume or not name.startswith((OPTIMIZER, REFERENCE))]
        with ThreadPoolExecutor(_VERIFYING_THREADS) as threads:
            found = dict(
                zip(names, threads.map(_describe, map(checkpoint.path.joinpath, names)), strict=True)
            )
        wrong = [name for name in names if found[name] != files[name]]
        if wrong:
            return f"{checkpoint.path / wrong[0]}: not the file that was written (size or sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # TypeError and AttributeError: the manifest is JSON of another shape, for example after a flipped bit.
        return f"{checkpoint.path}: unreadable ({error!r})"
    return None


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json."""
    state: dict[str, Any] = json.loads((checkpoint.path / STATE).read_text())
    return state


def mark_best(run_dir: Path, update: int, accuracy: float) -> None:
    """Record which checkpoint scored best; `prune` keeps it."""
    with whole_file(run_dir / BEST, durable=True) as draft:
        name = checkpoint_folder(run_dir, update).name
        write_json(draft, {"checkpoint": name, "update": update, "accuracy": accuracy})


def best(run_dir: Path) -> dict[str, Any] | None:
    """Return {"checkpoint", "update", "accuracy"} of the best checkpoint; None before the first evaluation.

    Raises:
        RunError: best.json is unreadable, so it is unknown which checkpoint must be kept.
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
    """Remove all checkpoints but the newest `keep` (at least 1), the best, and those in `protected` (not yet evaluated)."""
    marked = best(run_dir)
    spared = protected | ({int(marked["update"])} if marked else set())
    for checkpoint in find_checkpoints(run_dir)[:-keep]:
        if checkpoint.update not in spared:
            discard_folder(checkpoint.path)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a kill during a write or a removal left behind; nothing may be writing a checkpoint."""
    for leftover in run_dir.glob(f"{CHECKPOINT}*{UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)


def seal(temporary: Path, final: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Add the manifest to a finished folder, make it durable and rename it: until then the checkpoint does not exist.

    Args:
        temporary: The finished folder.
        final: Its name from now on. A damaged checkpoint of that name, which `newest_sound` skipped, is replaced.
        known: Entries of the manifest for files that need not be read again.
    """
    entries = dict(known or {})
    for path in temporary.iterdir():
        if path.name not in entries:
            entries[path.name] = _describe(path)
    write_json(temporary / MANIFEST, {"files": dict(sorted(entries.items()))})
    reach("checkpoint.manifest")
    seal_folder(temporary, final)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return one JSON object, indented."""
    return f"{json.dumps(content, indent=2)}\n".encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented."""
    path.write_bytes(as_json(content))
