"""A version's bytes where another process of this host can read them: a file in memory, mapped by both.

The writer has two files and fills them in turn, so that a reader has the time of one update to copy a
version. It never waits for readers: a version that was overwritten under a reader's eyes is told from a
whole one by the number at the file's beginning, which is not there while the bytes are written.
"""

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Where files are memory on Linux; elsewhere the folder for temporary files does, through the page cache.
MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
#: Bytes before the version's own: its number, and room up to a page.
HEADER_BYTES = mmap.PAGESIZE


class Shelf:
    """The writer's end: room for a version, and the file's path once it is whole."""

    def __init__(self) -> None:
        folder = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self._folder = Path(tempfile.mkdtemp(prefix="grpo-weights-", dir=folder))
        self._maps: list[mmap.mmap | None] = [None, None]

    def room(self, version: int, size: int) -> memoryview:
        """`size` writable bytes for a version; they stay as they are until the next but one asks for room.

        Where the host has no memory for such a file, plain bytes that nobody shares.
        """
        place = version % 2
        held = self._maps[place]
        if held is None or len(held) != HEADER_BYTES + size:
            held = self._maps[place] = self._file(place, HEADER_BYTES + size)
        if held is None:
            return memoryview(bytearray(size))
        held[:8] = bytes(8)
        return memoryview(held)[HEADER_BYTES:]

    def finish(self, version: int) -> str:
        """The version in its room is whole; returns where readers find it, or nothing where they can not."""
        held = self._maps[version % 2]
        if held is None:
            return ""
        held[:8] = _mark(version)
        return str(self._path(version % 2))

    def close(self) -> None:
        """Remove the files; who has one mapped may read on."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, place: int) -> Path:
        return self._folder / str(place)

    def _file(self, place: int, size: int) -> mmap.mmap | None:
        path = self._path(place)
        path.unlink(missing_ok=True)  # whoever has the old one mapped keeps it
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Asked for at once: to write to a page that the host does not have would kill the process.
            os.truncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            return mmap.mmap(descriptor, size)
        except OSError:
            path.unlink(missing_ok=True)
            return None
        finally:
            os.close(descriptor)


class Shared:
    """A version as its reader sees it: `data`, and afterwards whether it was `whole` all the time."""

    def __init__(self, mapped: mmap.mmap, version: int) -> None:
        self._mapped = mapped
        self._version = version
        self.data = memoryview(mapped)[HEADER_BYTES:]

    @property
    def whole(self) -> bool:
        """The bytes are those of the version, and were since it was opened."""
        return self._mapped[:8] == _mark(self._version)


@contextlib.contextmanager
def shared(path: str, version: int, size: int) -> Iterator[Shared | None]:
    """The bytes of a version, for as long as the block lasts; None: not on this host, or overwritten since.

    Nothing may look at the bytes after the block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        if os.fstat(descriptor).st_size != HEADER_BYTES + size:
            yield None
            return
        # All pages at once where the system can: one by one they take as long as the copy.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(descriptor, HEADER_BYTES + size, flags=flags, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    found = Shared(mapped, version)
    yield found if found.whole else None
    found.data.release()
    mapped.close()


def _mark(version: int) -> bytes:
    """What stands at the beginning while a version is whole; never zeros."""
    return (version + 1).to_bytes(8, "little")
