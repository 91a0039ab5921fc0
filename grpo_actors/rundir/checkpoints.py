"""Find, verify, mark and prune checkpoints as files. Loads no model and no MLX, because the supervisor reads them too.

A checkpoint is a folder that was renamed into place when it was complete. Its manifest holds the size and
sha256 of every file; a folder with a file more or less does not verify. A run continues from the newest checkpoint that
verifies.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from grpo_actors.atomic import UNFINISHED, discard_folder, seal_folder, whole_file
from grpo_actors.config.adapter_folder import MLX_LM_WEIGHTS
from grpo_actors.errors import RunError
from grpo_actors.failpoints import reach
from grpo_actors.rundir.folder import (
    BEST,
    CHECKPOINT,
    EVALUATION_FILE,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    REFERENCE,
    STATE,
    checkpoint_name,
    update_of,
)
from grpo_actors.rundir.reading import STRICT, read_json
from grpo_actors.schedule.lease import Cursor
from grpo_actors.score import Score

_log = logging.getLogger(__name__)

#: Suffix of the folder name of a checkpoint that was put aside because it did not verify. A number follows if a
#: checkpoint of that name was put aside before.
DAMAGED = ".damaged"
#: Files that are verified at the same time.
_VERIFYING_THREADS = 4
#: Files of a checkpoint that its manifest does not list: itself, and the score, which comes later.
_UNLISTED = (MANIFEST, EVALUATION_FILE, f"{EVALUATION_FILE}{UNFINISHED}")
#: A file of several that hold the arrays of one kind; the groups are the kind and the number of files.
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder that was renamed into place. Its files may be damaged; see `verify`."""

    path: Path
    #: Number of updates done when it was written.
    update: int

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum(path.stat().st_size for path in _files(self.path).values())


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


@dataclass(frozen=True, slots=True, kw_only=True)
class State(Snapshot):
    """The content of state.json."""

    #: Number of updates done.
    update: Annotated[int, Field(ge=1)]
    run_id: str
    #: Number of non-finite steps so far.
    skipped_steps: Annotated[int, Field(ge=0)]

    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class Best:
    """The content of best.json."""

    #: Name of the checkpoint's folder within the run folder, or "base".
    checkpoint: str
    #: Number of updates done; 0: the base model, which no checkpoint beat.
    update: Annotated[int, Field(ge=0)]
    score: Score

    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class _Entry:
    """Size and digest of one file."""

    bytes: int
    sha256: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True, slots=True)
class _Manifest:
    """The content of manifest.json: file -> entry. A file in a subfolder is called FOLDER/NAME."""

    files: dict[str, _Entry]

    __pydantic_config__ = STRICT


_state = TypeAdapter(State)
_best = TypeAdapter(Best)
_manifest = TypeAdapter(_Manifest)


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
        files = read_json(checkpoint.path / MANIFEST, _manifest, "the checkpoint cannot be used").files
        if fault := _incomplete(checkpoint.path, files):
            return fault
        names = [name for name in files if to_resume or not name.startswith((OPTIMIZER, REFERENCE))]
        with ThreadPoolExecutor(_VERIFYING_THREADS) as threads:
            found = threads.map(_describe, map(checkpoint.path.joinpath, names))
            wrong = [name for name, entry in zip(names, found, strict=True) if entry != files[name]]
        if wrong:
            return f"{checkpoint.path / wrong[0]}: not the file that was written (size or sha256 differs)"
        if to_resume:
            read_state(checkpoint)
    except OSError as error:
        return f"{error.filename or checkpoint.path}: cannot be read ({error.strerror})"
    except RunError as error:
        return str(error)
    return None


def _incomplete(folder: Path, listed: Collection[str]) -> str | None:
    """Return None if the manifest lists what a checkpoint must have and the folder holds nothing else, else the fault."""
    arrays = [name for name in listed if name.endswith(".safetensors")]
    has = {
        STATE: STATE in listed,
        "weights": any(name == MLX_LM_WEIGHTS or name.startswith(MODEL) for name in arrays),
        OPTIMIZER: any(name.startswith(OPTIMIZER) for name in arrays),
    }
    for what, is_listed in has.items():
        if not is_listed:
            return f"{folder / MANIFEST}: lists no {what}, so it is not the one that was written"
    for name in arrays:
        shard = _SHARD.fullmatch(name)
        if shard and sum(other.startswith(f"{shard[1]}-") for other in arrays) != int(shard[2]):
            return f"{folder / MANIFEST}: does not list all {int(shard[2])} files of {shard[1]}"
    # Whoever loads the folder would read the others too. A hidden file is the system's.
    there = {name for name in _files(folder) if not any(part.startswith(".") for part in name.split("/"))}
    if missing := sorted(set(listed) - there):
        return f"{folder / missing[0]}: is missing"
    if unlisted := sorted(there - set(listed) - set(_UNLISTED)):
        return f"{folder / unlisted[0]}: its {MANIFEST} does not list it; move it out of the checkpoint"
    return None


def read_state(checkpoint: Checkpoint) -> State:
    """Return the content of a checkpoint's state.json.

    Raises:
        RunError: It is unreadable, or belongs to another checkpoint.
    """
    path, cure = checkpoint.path / STATE, "a run cannot continue from this checkpoint"
    state = read_json(path, _state, cure)
    if state.update != checkpoint.update:
        raise RunError(f"{path}: update must be {checkpoint.update}, got {state.update}; {cure}")
    return state


def put_aside(folder: Path) -> Path:
    """Rename a checkpoint's folder so that nothing finds it any more; return its new path, which no earlier one has."""
    names = (f"{folder.name}{DAMAGED}{suffix}" for suffix in _suffixes())
    return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


def _suffixes() -> Iterator[str]:
    yield ""
    yield from (f"-{number}" for number in count(2))


def mark_best(run_dir: Path, update: int, score: Score) -> None:
    """Record which checkpoint scored best, or with update 0 that the base model did; `prune` keeps it."""
    with whole_file(run_dir / BEST, durable=True) as draft:
        name = checkpoint_name(update)
        write_json(draft, {"checkpoint": name, "update": update, "score": score.model_dump()})


def best(run_dir: Path) -> Best | None:
    """Return the mark of the best checkpoint or of the base model; None before the first evaluation.

    Raises:
        RunError: best.json is unusable, so it is unknown which checkpoint must be kept.
    """
    path, cure = run_dir / BEST, "remove it to let the next evaluation mark the best"
    if not path.exists():
        return None
    marked = read_json(path, _best, cure)
    # Also refuses a path that leads out of the run.
    if marked.checkpoint != (name := checkpoint_name(marked.update)):
        raise RunError(f"{path}: checkpoint must be {name}, got {marked.checkpoint[:60]!r}; {cure}")
    return marked


def best_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Return the checkpoint that best.json names; None before the first evaluation, and if no checkpoint beat the base.

    The second is a warning: the caller takes the newest checkpoint instead.
    """
    marked = best(run_dir)
    if marked is None:
        return None
    if not marked.update:
        _log.warning(
            "%s: no checkpoint beat the base model (%s: %s); the newest is used",
            *(run_dir, marked.score.measure, marked.score),
        )
        return None
    return Checkpoint(run_dir / marked.checkpoint, marked.update)


def prune(run_dir: Path, keep: int, protected: frozenset[int]) -> None:
    """Remove all checkpoints but the newest `keep` (at least 1), the best, and those in `protected` (not yet evaluated)."""
    marked = best(run_dir)
    spared = protected | ({marked.update} if marked else set())
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
    for name, path in _files(temporary).items():
        if name not in entries:
            entries[name] = asdict(_describe(path))
    write_json(temporary / MANIFEST, {"files": dict(sorted(entries.items()))})
    reach("checkpoint.manifest")
    seal_folder(temporary, final)


def _files(folder: Path) -> dict[str, Path]:
    """Return all files of a folder and its subfolders by their names in a manifest."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _describe(path: Path) -> _Entry:
    with path.open("rb") as file:
        return _Entry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return one JSON object, indented."""
    return f"{json.dumps(content, indent=2)}\n".encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented."""
    path.write_bytes(as_json(content))
