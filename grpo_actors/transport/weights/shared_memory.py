"""Transport by shared memory to processes on the same host: a file in memory that both sides map.

The writer has two files and fills them in turn, so a reader has the time of one update to copy a version. The writer
never waits for readers. The mark at the beginning of a file names the version while it is whole, and is zero while the
bytes are written. So a reader detects that a version was overwritten while it was reading. Both sides keep the files mapped from
version to version, because mapping a gigabyte takes as long as copying it.

A writer locks its folder as long as it lives. So whoever finds a folder without a lock knows that its writer was killed, on
hosts where containers share the memory but not the process ids, too, and removes it (`remove_leftovers`).
"""

import contextlib
import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo_actors.transport.weights.base import Buffer, Pin, PinMemory, ReceivedVersion, Version

#: Folder whose files are in memory on Linux. Elsewhere the temporary folder is used, through the page cache.
MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
#: Bytes before those of the version: the mark and the progress, padded to a page.
HEADER_BYTES = mmap.PAGESIZE
#: Where a file says how many chunks of the version have arrived from another host.
PROGRESS = slice(8, 16)
#: Number of files that a writer fills in turn.
FILES = 2
#: Prefix of the name of a writer's folder; its process id follows, for whoever looks at it.
PREFIX = "grpo-weights-"


class MappedFile:
    """A mapped file: `data` is the bytes after the header, `pin` their registration with the device."""

    def __init__(self, mapped: mmap.mmap, pin: PinMemory) -> None:
        self._mapped = mapped
        self.data = memoryview(mapped)[HEADER_BYTES:]
        self.pin: Pin | None = pin(self.data)

    def received(self, mark: bytes) -> ReceivedVersion:
        """Return the bytes, which belong to the version with this mark as long as the file has it."""
        return ReceivedVersion(self.data, self.pin, of_this_host=True, whole=lambda: self.mark == mark)

    @property
    def mark(self) -> bytes:
        """The first eight bytes (see `_mark`)."""
        return self._mapped[:8]

    @mark.setter
    def mark(self, mark: bytes) -> None:
        self._mapped[:8] = mark

    def note_progress(self, chunks: int) -> None:
        """Write how many chunks have arrived from another host."""
        self._mapped[PROGRESS] = chunks.to_bytes(8, "little")

    def unpin(self) -> None:
        """End the registration. The memory can then be unmapped, once nothing uses it any more."""
        if self.pin is not None:
            self.pin.close()
            self.pin = None

    def close(self) -> None:
        """Unmap the file; nothing may use the bytes any more."""
        self.unpin()
        self.data.release()
        self._mapped.close()


class SharedMemoryWriter:
    """The sender: gives memory for a version, and its file's path once the version is whole."""

    def __init__(self, pin: PinMemory) -> None:
        """Create the folder. `pin` is called with the memory of each file once, before the first write."""
        remove_leftovers()
        self._folder, self._lock = _locked_folder()
        self._pin = pin
        self._files: list[MappedFile | None] = [None] * FILES

    def buffer(self, version: int, size: int) -> Buffer | None:
        """Return `size` writable bytes for a version; None if the host has no memory for such a file."""
        slot = version % FILES
        held = self._files[slot]
        if held is None or len(held.data) != size:
            if held is not None:
                held.unpin()
            held = self._files[slot] = self._file(slot, HEADER_BYTES + size)
        if held is None:
            return None
        held.mark = bytes(8)
        return Buffer(held.data, held.pin)

    def publish(self, version: int, data: memoryview) -> str:
        """Mark the version in its buffer as whole, and return its path; empty if it was written elsewhere."""
        held = self._files[version % FILES]
        if held is None or held.data is not data:
            return ""
        held.mark = _mark(version)
        return str(self._path(version % FILES))

    def close(self) -> None:
        """Remove the files; a process that has one mapped can continue to read it."""
        for held in self._files:
            if held is not None:
                held.unpin()
        self.unlink()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def unlink(self) -> None:
        """Remove the files only; may be called at any moment, by any thread, more than once."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, slot: int) -> Path:
        return self._folder / str(slot)

    def _file(self, slot: int, size: int) -> MappedFile | None:
        return allocate(self._path(slot), size, self._pin)


class SharedMemoryReader:
    """The receiver. Files stay mapped from version to version."""

    def __init__(self, pin: PinMemory) -> None:
        """`pin` is called with each file's memory once."""
        self._files = MappedFiles(pin)

    def fetch(self, version: Version, on_chunk: Callable[[], None] = lambda: None) -> ReceivedVersion | None:
        """Return the bytes of a version without copying; None if it is not on this host, or was overwritten."""
        del on_chunk
        mark = _mark(version.number)
        found = (self._files.open(path, HEADER_BYTES + version.size) for path in version.addresses)
        return next((held.received(mark) for held in found if held is not None and held.mark == mark), None)

    def close(self) -> None:
        """Unmap everything."""
        self._files.close()


class MappedFiles:
    """The files that a process has mapped: at most `FILES`, each until another one takes its place."""

    def __init__(self, pin: PinMemory) -> None:
        """`pin` is called with each file's memory once."""
        self._pin = pin
        #: (device, inode) -> the mapped file. A new file at an old path has another key.
        self._files: dict[tuple[int, int], MappedFile] = {}

    def open(self, path: str | Path, size: int) -> MappedFile | None:
        """Map a file of `size` bytes, unless it is mapped already; None if there is none of this size."""
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            found = os.fstat(descriptor)
            if found.st_size != size:
                return None
            file = (found.st_dev, found.st_ino)
            if file not in self._files:
                while len(self._files) >= FILES:
                    self._files.pop(next(iter(self._files))).close()
                self._files[file] = MappedFile(_map(descriptor, size), self._pin)
            return self._files[file]
        return None

    def close(self) -> None:
        """Unmap everything."""
        while self._files:
            self._files.popitem()[1].close()


def allocate(path: Path, size: int, pin: PinMemory) -> MappedFile | None:
    """Make a file of `size` bytes in the place of any other, and map it; None if the host has no memory for it."""
    path.unlink(missing_ok=True)  # a process that has the old file mapped keeps it
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Allocate all pages now: a write to a page that the host cannot provide would kill the process.
        os.truncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        return MappedFile(mmap.mmap(descriptor, size), pin)
    except OSError:
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)


def remove_leftovers() -> None:
    """Remove the files of this user's killed writers; their memory would otherwise never be freed."""
    for left in memory_folder().glob(f"{PREFIX}*-*"):
        with contextlib.suppress(OSError):  # it has gone meanwhile, or is another user's
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid() and lock(descriptor):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def memory_folder() -> Path:
    """Return the folder for the folders of all writers."""
    return MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _locked_folder() -> tuple[Path, int]:
    """Make a folder and lock it; return its path and the lock's descriptor."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=memory_folder()))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # Another start may have taken the folder for a leftover before it was locked.
        if lock(descriptor) and folder.is_dir():
            return folder, descriptor
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock an open file or folder for its holder alone; return False if a living process holds its lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> mmap.mmap:
    # Map all pages at once where the system can; one by one they take as long as the copy. Writable, although no reader
    # writes, because CUDA's driver accepts no other memory.
    return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _mark(version: int) -> bytes:
    """Return the first eight bytes of a file whose version is whole; never zeros."""
    return (version + 1).to_bytes(8, "little")
