"""Transport by shared memory, to processes of the same host: a file in memory that both sides map.

The writer has two files and fills them in turn, so that a reader has the time of one update to copy a
version. It never waits for readers: a version that was overwritten under a reader's eyes is told from a
whole one by the number at the file's beginning, which is not there while the bytes are written. Both sides keep
the files mapped from version to version: to map a gigabyte takes as long as to copy it.
"""

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo_actors.transport.weights.base import Arrived, Pin, PinMemory, Room, Version

#: Where files are memory on Linux; elsewhere the folder for temporary files does, through the page cache.
MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
#: Bytes before the version's own: its number, and room up to a page.
HEADER_BYTES = mmap.PAGESIZE
#: Files that a writer fills in turn.
FILES = 2
#: Of the writer's folder; its process id follows.
PREFIX = "grpo-weights-"


class Mapped:
    """A mapped file: `data` behind the header, and what `pin` made of it."""

    def __init__(self, mapped: mmap.mmap, pin: PinMemory) -> None:
        self._mapped = mapped
        self.data = memoryview(mapped)[HEADER_BYTES:]
        self.pin: Pin | None = pin(self.data)

    @property
    def mark(self) -> bytes:
        """What stands at the beginning."""
        return self._mapped[:8]

    @mark.setter
    def mark(self, mark: bytes) -> None:
        self._mapped[:8] = mark

    def unpin(self) -> None:
        """The memory may be unmapped, by whoever looks at it last."""
        if self.pin is not None:
            self.pin.close()
            self.pin = None

    def close(self) -> None:
        """Nothing may look at the bytes any more."""
        self.unpin()
        self.data.release()
        self._mapped.close()


class Shelf:
    """The outlet: room for a version, and the file's path once it is whole."""

    def __init__(self, pin: PinMemory) -> None:
        """`pin` is given the memory once, before it is first written."""
        folder = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _remove_leftovers(folder)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=folder))
        self._pin = pin
        self._files: list[Mapped | None] = [None] * FILES

    def room(self, version: int, size: int) -> Room | None:
        """`size` writable bytes for a version; None where the host has no memory for such a file."""
        place = version % FILES
        held = self._files[place]
        if held is None or len(held.data) != size:
            if held is not None:
                held.unpin()
            held = self._files[place] = self._file(place, HEADER_BYTES + size)
        if held is None:
            return None
        held.mark = bytes(8)
        return Room(held.data, held.pin)

    def put(self, version: int, data: memoryview) -> str:
        """Mark the version in its room as whole; returns its path, or nothing if it was written elsewhere."""
        held = self._files[version % FILES]
        if held is None or held.data is not data:
            return ""
        held.mark = _mark(version)
        return str(self._path(version % FILES))

    def close(self) -> None:
        """Remove the files; who has one mapped may read on."""
        for held in self._files:
            if held is not None:
                held.unpin()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, place: int) -> Path:
        return self._folder / str(place)

    def _file(self, place: int, size: int) -> Mapped | None:
        path = self._path(place)
        path.unlink(missing_ok=True)  # whoever has the old one mapped keeps it
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Asked for at once: to write to a page that the host does not have would kill the process.
            os.truncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            return Mapped(mmap.mmap(descriptor, size), self._pin)
        except OSError:
            path.unlink(missing_ok=True)
            return None
        finally:
            os.close(descriptor)


class Reader:
    """The inlet. Files stay mapped from version to version."""

    def __init__(self, pin: PinMemory) -> None:
        """`pin` is given each file's memory once."""
        self._pin = pin
        #: (device, inode) -> the file. A new file at an old path is another one.
        self._files: dict[tuple[int, int], Mapped] = {}

    def take(self, version: Version, on_chunk: Callable[[], None] = lambda: None) -> Arrived | None:
        """The bytes of a version, not copied; None: not on this host, or overwritten since."""
        del on_chunk
        found = (self._read(path, version) for path in version.addresses)
        return next((arrived for arrived in found if arrived is not None), None)

    def _read(self, path: str, version: Version) -> Arrived | None:
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            found = os.fstat(descriptor)
            if found.st_size != HEADER_BYTES + version.size:
                return None
            file = (found.st_dev, found.st_ino)
            if file not in self._files:
                while len(self._files) >= FILES:
                    self._files.pop(next(iter(self._files))).close()
                self._files[file] = Mapped(_map(descriptor, found.st_size), self._pin)
            mapped = self._files[file]

            def whole() -> bool:
                return mapped.mark == _mark(version.number)

            return Arrived(mapped.data, mapped.pin, of_this_host=True, whole=whole) if whole() else None
        return None

    def close(self) -> None:
        """Unmap everything."""
        while self._files:
            self._files.popitem()[1].close()


def _remove_leftovers(folder: Path) -> None:
    """What writers that were killed could not remove: memory that nobody would ever give back."""
    for left in folder.glob(f"{PREFIX}*-*"):
        process = left.name.removeprefix(PREFIX).partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (PermissionError, ValueError):
            continue  # another user's, or nobody's that we know


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> mmap.mmap:
    # All pages at once where the system can: one by one they take as long as the copy. Writable, though nobody here
    # writes: CUDA's driver takes no other memory.
    return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _mark(version: int) -> bytes:
    """What stands at the beginning while a version is whole; never zeros."""
    return (version + 1).to_bytes(8, "little")
