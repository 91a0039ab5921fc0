"""Number records, write them to two files of the run folder, then publish them.

``metrics.jsonl`` holds every record, one per line, numbered without a gap. Of a ``sample`` it holds only
update and problem; the texts are in ``completions.jsonl`` under the same number, so that the metrics
stay small. A record is complete in the file before it is published: a reader that missed an event finds
it there. This module has no socket: the caller passes a function that publishes.
"""

import functools
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from grpo_actors.atomic import PRIVATE_FILE
from grpo_actors.errors import ProtocolError, RunError
from grpo_actors.observe.records import Record, decode, encode, make_record
from grpo_actors.rundir.folder import COMPLETIONS_FILE, METRICS_FILE

#: A function that takes a topic and an encoded record; it must not block.
Publish = Callable[[str, bytes], object]


class Journal:
    """The writer of a run's records: numbers, writes and publishes them; belongs to one thread of one process.

    A checkpoint stores `seq`. A resumed run opens the journal with it, and what was written later is cut
    off, so that checkpoint and files agree. The caller holds the lock on the run folder.
    """

    #: Records up to the initial `seq` that the file lacks, for example because ``log_jsonl`` was off for a
    #: while. They cannot be recovered; the caller may log it.
    missing: int = 0

    def __init__(
        self,
        folder: Path,
        *,
        seq: int = 0,
        log_jsonl: bool = True,
        publish: Publish | None = None,
        session: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the files of `folder` to continue after record `seq` (0: empty them).

        Without `log_jsonl` no file is touched: records are only numbered and published. `session` names the life
        of the process that writes; if it is empty, a name is chosen.
        """
        self._seq = seq
        self._publish = publish
        self._session = session or uuid.uuid4().hex[:8]
        self._clock = clock
        self._metrics: LineFile | None = None
        self._completions: LineFile | None = None
        if log_jsonl:
            keeps = functools.partial(_is_up_to, last_seq=seq)
            self._metrics = LineFile(folder / METRICS_FILE, keeps, switch="metrics.log_jsonl")
            try:
                self._completions = LineFile(folder / COMPLETIONS_FILE, keeps, switch="metrics.log_jsonl")
            except RunError:
                self._metrics.close()
                raise
            self.missing = seq - self._metrics.kept

    @property
    def seq(self) -> int:
        """The number of the last record; a checkpoint stores it."""
        return self._seq

    def append(self, topic: str, fields: Mapping[str, Any]) -> Record:
        """Number, write and publish one record, and return it.

        A `RunError` (disk full) leaves files and numbering unchanged and publishes nothing: the call may be
        repeated once there is free space.
        """
        record = make_record(self._seq + 1, self._clock(), topic, fields, self._session)
        line = encode(record)
        self._write(record, line)
        self._seq += 1
        if self._publish is not None:
            self._publish(topic, line)
        return record

    def sync(self) -> None:
        """Return once all records are on disk; call it before writing a checkpoint that stores `seq`."""
        for file in self._files():
            file.sync()

    def close(self) -> None:
        """Close the files; may be called twice."""
        for file in self._files():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _files(self) -> list["LineFile"]:
        return [file for file in (self._metrics, self._completions) if file is not None]

    def _write(self, record: Record, line: bytes) -> None:
        if self._metrics is None or self._completions is None:
            return
        if record["topic"] != "sample":
            self._metrics.write(line)
            return
        # Texts first: a reader that sees the number in metrics.jsonl finds the texts already there.
        before = self._completions.size
        self._completions.write(line)
        try:
            keys = ("seq", "time", "session", "topic", "update", "problem")
            self._metrics.write(encode({key: record[key] for key in keys}))
        except RunError:
            self._completions.cut(before)
            raise


class LineFile:
    """An append-only file of JSON lines that shows a torn line only while a write is in progress."""

    def __init__(self, path: Path, keeps: Callable[[bytes], bool], *, switch: str = "") -> None:
        """Open the file and cut off the lines that a resumed process will write again.

        Args:
            path: The file; created if it does not exist.
            keeps: Return whether to keep a line. The first line that is not kept, or is torn, is cut off
                together with all lines after it. `ProtocolError`: the line does not belong in this file.
            switch: The setting that turns the file off, if there is one.
        """
        self.path = path
        self._switch = switch
        try:
            path.touch(PRIVATE_FILE)
            #: Number of lines kept, and the file's size in bytes.
            self.kept, self.size = _kept_head(path, keeps)
            os.truncate(path, self.size)
            # Unbuffered: a buffer would keep what a full disk rejected, and write it again later.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._failure("cannot be opened", error) from error

    def write(self, *lines: bytes) -> None:
        """Append lines, either all of them or none."""
        data = b"".join(line + b"\n" for line in lines)
        rest = memoryview(data)
        try:
            while rest:  # a nearly full file system may write only a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.cut(self.size)
            raise self._failure("cannot be written", error) from error
        self.size += len(data)

    def cut(self, size: int) -> None:
        """Truncate the file to `size` bytes; needs no free disk space."""
        self._file.truncate(size)
        self.size = size

    def sync(self) -> None:
        """Return once all lines are on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure("cannot be written", error) from error

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def _failure(self, what: str, error: OSError) -> RunError:
        without = f", or set {self._switch} = false" if self._switch else ""
        return RunError(
            f"{self.path} {what} ({error.strerror}); free some space or make the folder writable{without}"
        )


def _is_up_to(line: bytes, *, last_seq: int) -> bool:
    """Return whether the record's number is at most `last_seq`."""
    return bool(decode(line)["seq"] <= last_seq)


def _kept_head(path: Path, keeps: Callable[[bytes], bool]) -> tuple[int, int]:
    """Return how many lines at the head of the file to keep, and their size in bytes.

    A line without its newline was torn by a kill. A complete line that is not a record was put there by
    someone else and must not be deleted: `RunError`.
    """
    kept = size = 0
    for line in _whole_lines(path):
        try:
            if not keeps(line):
                break
        except ProtocolError as error:
            raise _refusal(path, kept + 1, error) from error
        kept += 1
        size += len(line)
    return kept, size


def read_records(path: Path) -> Iterator[Record]:
    """Yield all records of metrics.jsonl; none if there is no such file.

    Raises:
        RunError: A complete line is not a record.
    """
    if not path.is_file():
        return
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            yield decode(line)
        except ProtocolError as error:
            raise _refusal(path, number, error) from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file up to one that a kill tore."""
    with path.open("rb") as file:
        yield from itertools.takewhile(lambda line: line.endswith(b"\n"), file)


def _refusal(path: Path, number: int, error: ProtocolError) -> RunError:
    return RunError(f"{path}, line {number}: {error}; move the file away to resume without it")
