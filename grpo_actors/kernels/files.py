"""The files of compiled kernels: a folder has NAME.ptx (code), NAME.txt (entry points) and NAME.cu (source) of each.

MLX writes them in place and in this order, and reads a kernel as soon as NAME.ptx exists. So a folder in which one
process compiles must not be read by another: kernels go from folder to folder here, each file under its name only when it
is whole, and the code last. Names may contain folders. Loads no MLX.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

CODE, ENTRIES, SOURCE = ".ptx", ".txt", ".cu"


def kernels_in(folder: Path) -> Iterator[str]:
    """Yield the names of the kernels that a process may load."""
    return (_name(path, folder) for path in folder.rglob(f"*{CODE}"))


def compiled_in(folder: Path) -> Iterator[str]:
    """Yield the names of the kernels that were compiled in `folder`; code and entry points are whole by then.

    What `copy` brought has no source there.
    """
    return (_name(path, folder) for path in folder.rglob(f"*{SOURCE}") if path.stat().st_size)


def link(names: Iterable[str], origin: Path, target: Path) -> None:
    """Let a process that computes in `target` load these kernels of `origin`."""
    for name in names:
        for suffix in (ENTRIES, CODE):
            final = target / f"{name}{suffix}"
            final.parent.mkdir(parents=True, exist_ok=True)
            final.symlink_to((origin / f"{name}{suffix}").absolute())


def publish(names: Iterable[str], origin: Path, target: Path) -> list[str]:
    """Add the kernels that `target` lacks, with their sources, which people read; return their names."""
    return _place(names, origin, target, (ENTRIES, SOURCE, CODE))


def copy(names: Iterable[str], origin: Path, target: Path) -> list[str]:
    """Add the kernels that `target` lacks, without their sources; return their names."""
    return _place(names, origin, target, (ENTRIES, CODE))


def _place(names: Iterable[str], origin: Path, target: Path, suffixes: tuple[str, ...]) -> list[str]:
    # Copies, not links: a process that is compiling the same kernel will write to the file that it then finds.
    placed = [name for name in names if not (target / f"{name}{CODE}").exists()]
    for name in placed:
        for suffix in suffixes:
            final = target / f"{name}{suffix}"
            final.parent.mkdir(parents=True, exist_ok=True)
            draft = final.with_name(f".{os.getpid()}.tmp")  # another run may be placing the same kernel
            shutil.copyfile(origin / f"{name}{suffix}", draft)
            draft.replace(final)
    return placed


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))
