"""Transport to another host: the first worker there fetches a version in chunks, and the others read its copy.

The copy is a file in memory that all workers of a run on the host map, as those on the learner's host map the learner's
(`shared_memory`). Versions take two files in turn. Whoever finds no whole copy takes the lock, fetches the version into
the file, checks its digest and marks it; who does not get the lock waits. A process that dies loses the lock, and the
next one fetches. The mark is the digest's: a learner that is started again may use a number again for other weights.

A worker never depends on another: if the one that fetches makes no progress for `FETCH_TIMEOUT_S`, or there is no memory
for a file, each fetches for itself.

Every worker holds a shared lock on the folder as long as it lives. The last one to leave removes it; what killed ones
leave is removed as a writer's is (`remove_leftovers`).
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from grpo_actors.errors import ProtocolError
from grpo_actors.transport.weights.base import PinMemory, ReceivedVersion, Version
from grpo_actors.transport.weights.chunks import FETCH_TIMEOUT_S, ChunkReceiver, WeightsSocket
from grpo_actors.transport.weights.shared_memory import (
    FILES,
    HEADER_BYTES,
    PREFIX,
    PROGRESS,
    MappedFile,
    MappedFiles,
    allocate,
    lock,
    memory_folder,
    remove_leftovers,
)

#: Seconds between two looks of a worker that waits for the copy.
POLL_S = 0.01


class HostCopyReceiver:
    """A receiver that shares what it fetches with the other workers of its run on this host."""

    def __init__(self, socket: WeightsSocket, pin: PinMemory, run: str) -> None:
        """Keep the parts; `run` names what is shared, and if it is empty, nothing is."""
        self._wire = socket.wire
        self._chunks = ChunkReceiver(socket)
        self._files = MappedFiles(pin)
        self._run = run
        self._folder: _SharedFolder | None = None

    def fetch(self, version: Version, on_chunk: Callable[[], None]) -> ReceivedVersion | None:
        """Return a version's bytes, fetched by whichever process; None as `ChunkReceiver.fetch`.

        `on_chunk` is also called while another process fetches.

        Raises:
            ProtocolError: as `ChunkReceiver.fetch`; also if fetched bytes do not have the digest.
        """
        if self._run and version.digest and self._folder is None:
            self._folder = _SharedFolder.enter(self._run)
        if self._folder is None or not version.digest:
            return self._chunks.fetch(version, on_chunk)
        try:
            return self._fetch_once(self._folder, version, on_chunk)
        except FileNotFoundError:
            # The folder was removed, as by what tidies up temporary files. The next fetch makes one.
            self._leave()
            return self._chunks.fetch(version, on_chunk)

    def _fetch_once(
        self, folder: "_SharedFolder", version: Version, on_chunk: Callable[[], None]
    ) -> ReceivedVersion | None:
        """Return the copy in a folder; fetch it if no other process does."""
        path, mark = folder.path / str(version.number % FILES), _mark(version.digest)
        other = _Fetcher(path)
        while (held := self._files.open(path, HEADER_BYTES + version.size)) is None or held.mark != mark:
            with folder.fetching() as is_mine:
                if is_mine:
                    return self._fetch_for_all(path, version, on_chunk)
            if other.silent_s > FETCH_TIMEOUT_S:
                return self._chunks.fetch(version, on_chunk)
            on_chunk()
            time.sleep(POLL_S)
        return held.received(mark)

    def close(self) -> None:
        """Unmap everything, and remove the files if no other process needs them."""
        self._files.close()
        self._leave()

    def _leave(self) -> None:
        if self._folder is not None:
            self._folder.leave()
            self._folder = None

    def _fetch_for_all(
        self, path: Path, version: Version, on_chunk: Callable[[], None]
    ) -> ReceivedVersion | None:
        """Fetch a version into its file, with the lock held."""
        held = self._file(path, HEADER_BYTES + version.size)
        if held is None:
            return self._chunks.fetch(version, on_chunk)
        mark = _mark(version.digest)
        if held.mark != mark:  # else another process has fetched it just now
            held.mark = bytes(8)
            arrived = 0

            def note_chunk() -> None:
                nonlocal arrived
                arrived += 1
                held.note_progress(arrived)
                on_chunk()

            if not self._chunks.fetch_into(held.data, version, note_chunk):
                return None
            if self._wire.digest(held.data) != version.digest:
                raise ProtocolError(
                    f"version {version.number}: its bytes do not have the digest of its manifest"
                )
            held.mark = mark
        return held.received(mark)

    def _file(self, path: Path, size: int) -> MappedFile | None:
        """Map the file, made anew if it has another size; None if the host has no memory for it."""
        held = self._files.open(path, size)
        if held is None and (made := allocate(path, size, lambda _: None)) is not None:
            made.close()
            held = self._files.open(path, size)
        return held


@dataclass
class _SharedFolder:
    """The folder of the copies of one run, for all its workers on this host."""

    path: Path
    #: Open as long as this process is one of them, with a shared lock.
    descriptor: int

    @classmethod
    def enter(cls, run: str) -> Self | None:
        """Join the folder of a run, and make it if there is none; None if it is not this user's, or just being removed."""
        remove_leftovers()
        name = hashlib.sha256(run.encode()).hexdigest()[:12]
        path = memory_folder() / f"{PREFIX}host-{os.getuid()}-{name}"
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            path.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            found = os.fstat(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Before it was locked, the last worker may have removed it.
            if found.st_uid == os.getuid() and not found.st_mode & 0o077 and _is_at(path, descriptor):
                stack.pop_all()
                return cls(path, descriptor)
        return None

    @contextlib.contextmanager
    def fetching(self) -> Iterator[bool]:
        """Hold the lock of the process that fetches; yield whether it was free."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield lock(descriptor)
        finally:
            os.close(descriptor)

    def leave(self) -> None:
        """Leave the folder; the last process removes it."""
        if lock(self.descriptor) and _is_at(self.path, self.descriptor):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.descriptor)


class _Fetcher:
    """The process that fetches a version into a file, as one that waits for it sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = b""
        self._seen_s = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the file was last seen to change."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            header = file.read(PROGRESS.stop)
            if header != self._seen:
                self._seen, self._seen_s = header, time.monotonic()
        return time.monotonic() - self._seen_s


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open folder is still the one at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _mark(digest: str) -> bytes:
    """Return the first eight bytes of a file that holds the whole version with this digest; never zeros."""
    return bytes.fromhex(digest)[:7] + b"\x01"
