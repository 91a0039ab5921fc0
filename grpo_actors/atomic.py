"""Make files and folders that are complete or absent: each gets its name only when it is finished.

Until then a file or folder NAME is written as ``NAME.tmp``. A reader never sees half of one, and a process that is
killed leaves the old content.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from grpo_actors.errors import ModelError, first_line
from grpo_actors.failpoints import reach

#: Suffix of a file or folder that is being written or removed.
UNFINISHED = ".tmp"

#: Modes of files and folders that hold prompts, or the way to them.
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700

#: A disk with fewer bytes left may have refused any write.
FULL_BYTES = 1 << 20

#: File names: `new_folder` replaces only a folder that has one of them.
_MARKS = ("config.json", "adapter_config.json")


def draft_of(target: Path) -> Path:
    """Return the temporary path under which `target` is written."""
    return target.with_name(f"{target.name}{UNFINISHED}")


@contextmanager
def whole_file(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a draft that replaces `target` if the block succeeds and is removed if it raises.

    Args:
        target: The file to create or to replace.
        durable: Whether the content must survive a power failure.
    """
    draft = draft_of(target)
    try:
        yield draft
        if durable:
            _sync(draft)
        draft.replace(target)
    finally:
        if draft.is_file():  # after a success it was renamed
            draft.unlink()


def write_whole(target: Path, text: str, *, durable: bool = False) -> None:
    """Replace the content of `target`, which only this user may read; see `whole_file`."""
    with whole_file(target, durable=durable) as draft:
        draft.touch(PRIVATE_FILE)
        draft.write_text(text)


def write_contents(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of an existing folder by their names; FOLDER/NAME is in a subfolder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def seal_folder(draft: Path, target: Path) -> None:
    """Make the finished folder `draft` durable and rename it to `target`; discard an old `target` first."""
    for path in (*draft.rglob("*"), draft):
        _sync(path)
    if target.exists():
        discard_folder(target)
    draft.rename(target)
    _sync(target.parent)


def write_fault(error: OSError | RuntimeError, folder: Path) -> str:
    """Return why a file in `folder` could not be written, with the cure if the disk is full, and only then.

    A RuntimeError is MLX's, which has no error number: then a disk with less than `FULL_BYTES` left counts as full.
    """
    text = (isinstance(error, OSError) and error.strerror) or first_line(error)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    else:
        full = shutil.disk_usage(folder).free < FULL_BYTES
    return f"{text}; free space on this disk" if full else text


def discard_folder(folder: Path) -> None:
    """Remove a folder. Rename it first, so that a kill in the middle leaves no folder that looks complete."""
    renamed = draft_of(_old(folder))
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    reach("folder.discarded")
    shutil.rmtree(renamed, ignore_errors=True)


@contextmanager
def new_file(target: Path, *, overwrite: bool, option: str) -> Iterator[Path]:
    """Yield the draft of the file that a user requested by the command line's `option`; see `whole_file`.

    Raises:
        ModelError: `target` exists and may not be replaced, or cannot be written.
    """
    if target.is_dir():
        raise ModelError(f"{target}: {option} must be a file, got a folder")
    if target.exists() and not overwrite:
        raise ModelError(f"{target}: the file is there; add --overwrite or choose another {option}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as draft:
            yield draft
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error


@contextmanager
def new_folder(target: Path, *, overwrite: bool, option: str, precious: Sequence[str]) -> Iterator[Path]:
    """Yield an empty draft folder that becomes `target` if the block succeeds and is removed if it raises.

    Args:
        target: The folder to create.
        overwrite: Whether an existing model or adapter folder may be replaced.
        option: The command line's option that named `target`.
        precious: File name patterns; a folder that has a matching file is never replaced.

    Raises:
        ModelError: `target` exists and may not be replaced, or cannot be written.
    """
    _refuse_occupied(target, option, precious, overwrite=overwrite)
    draft = draft_of(target)
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
        # After a success the draft was renamed, and nothing is left to remove.
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_occupied(target: Path, option: str, precious: Sequence[str], *, overwrite: bool) -> None:
    if not target.name:
        raise ModelError(f"{option} must name a folder to make, got {target}")
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: {option} must be a folder, got a file")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ModelError(f"{target}: the folder is not empty; add --overwrite or choose another {option}")
    # A typing error must not delete a home folder or a run.
    if not any((target / name).is_file() for name in _MARKS):
        raise ModelError(
            f"{target}: --overwrite replaces model folders only, and this one has no config.json"
        )
    if any(any(target.glob(pattern)) for pattern in precious):
        raise ModelError(
            f"{target}: --overwrite replaces model folders only, and this is a run's; choose another {option}"
        )
    old = _old(target)
    if old.exists():
        raise ModelError(f"{old}: left by a tool that was killed; move it back to {target}, or delete it")


def _publish(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`; delete the old folder only after the new one has its name."""
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
    return target.with_name(f"{target.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
