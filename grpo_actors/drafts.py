"""What a tool makes is whole or absent: a folder or a file that gets its name when it is finished."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_actors.errors import ModelError

#: A folder with one of these may be replaced, unless it is a run's, or one of its checkpoints.
_MARKS = ("config.json", "adapter_config.json")
_OF_A_RUN = ("metrics.jsonl", "best.json", "manifest.json", "checkpoint-*")


@contextmanager
def new_folder(target: Path, *, overwrite: bool, option: str) -> Iterator[Path]:
    """An empty folder ``target.tmp`` that becomes `target` if the block ends well and is removed if not.

    Args:
        target: where the folder shall be.
        overwrite: whether a model or an adapter that is there may be replaced.
        option: the one that named it.

    Raises:
        ModelError: `target` is in the way, or the disk refuses.
    """
    _refuse_occupied(target, option, overwrite=overwrite)
    draft = target.with_name(target.name + ".tmp")
    if draft.exists():
        raise ModelError(
            f"{draft}: another tool is writing it, or one was killed; delete it if none is running"
        )
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"{draft}: cannot be made: {error.strerror}; choose another {option}") from None
    try:
        yield draft
        _publish(draft, target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        # After a success it is gone already.
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_occupied(target: Path, option: str, *, overwrite: bool) -> None:
    if not target.name:
        raise ModelError(f"{option} must name a folder to make, got {target}")
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: {option} must be a folder, got a file")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ModelError(f"{target}: the folder is not empty; add --overwrite or choose another {option}")
    # A slip of the hand must not delete somebody's home, or a run.
    if not any((target / name).is_file() for name in _MARKS):
        raise ModelError(
            f"{target}: --overwrite replaces model folders only, and this one has no config.json"
        )
    if any(any(target.glob(pattern)) for pattern in _OF_A_RUN):
        raise ModelError(
            f"{target}: --overwrite replaces model folders only, and this is a run's; choose another {option}"
        )
    old = _old(target)
    if old.exists():
        raise ModelError(f"{old}: left by a tool that was killed; move it back to {target}, or delete it")


def _publish(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; the old folder is deleted when the new one has its name."""
    if not target.exists() or not any(target.iterdir()):
        draft.replace(target)
        return
    old = _old(target)
    target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _old(target: Path) -> Path:
    return target.with_name(target.name + ".old")


@contextmanager
def new_file(target: Path, *, overwrite: bool, option: str) -> Iterator[Path]:
    """The path ``target.tmp`` of a file that becomes `target` if the block ends well and is removed if not.

    Raises:
        ModelError: `target` is in the way, or the disk refuses.
    """
    if target.is_dir():
        raise ModelError(f"{target}: {option} must be a file, got a folder")
    if target.exists() and not overwrite:
        raise ModelError(f"{target}: the file is there; add --overwrite or choose another {option}")
    draft = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
