"""Where records go: numbered, to two files of the run folder, then to whoever listens.

``metrics.jsonl`` holds every record, one a line, numbered without a gap. Of a ``sample`` it holds only
update and problem; the texts stand in ``completions.jsonl`` under the same number, so that the metrics
stay small. A record is whole in the file before it is published: a reader who missed an event finds
it there. Knows no socket: to publish is a function given by the caller.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from grpo_actors.errors import ProtocolError, RunError
from grpo_actors.observe.records import Record, decode, encode, make_record
from grpo_actors.rundir.folder import COMPLETIONS_FILE, METRICS_FILE

#: Takes a topic and an encoded record; must not block.
Publish = Callable[[str, bytes], object]


class Journal:
    """Numbers records, writes them, publishes them; belongs to one thread of one process.

    A checkpoint stores `seq`; a resumed run opens with it and what was written later is cut off, so
    that both files tell one story. The lock on the run folder is the caller's.
    """

    #: Records up to the `seq` opened with that the file does not have, for example because
    #: ``log_jsonl`` was off for a while. Nothing can bring them back; the caller may say so.
    missing: int = 0

    def __init__(
        self,
        folder: Path,
        *,
        seq: int = 0,
        log_jsonl: bool = True,
        publish: Publish | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the files of `folder` after record `seq` (0: empty them).

        Without `log_jsonl` no file is touched: records are numbered and published only.
        """
        self._seq = seq
        self._publish = publish
        self._clock = clock
        self._metrics: LineFile | None = None
        self._completions: LineFile | None = None
        if log_jsonl:
            keeps = functools.partial(_is_told, last_seq=seq)
            self._metrics = LineFile(folder / METRICS_FILE, keeps, switch="metrics.log_jsonl")
            try:
                self._completions = LineFile(folder / COMPLETIONS_FILE, keeps, switch="metrics.log_jsonl")
            except RunError:
                self._metrics.close()
                raise
            self.missing = seq - self._metrics.kept

    @property
    def seq(self) -> int:
        """Number of the last record; what a checkpoint stores."""
        return self._seq

    def append(self, topic: str, fields: Mapping[str, Any]) -> Record:
        """Number, write and publish one record, and return it.

        A `RunError` (disk full) leaves files and numbering as before the call and publishes nothing:
        the call may be repeated once there is room.
        """
        record = make_record(self._seq + 1, self._clock(), topic, fields)
        line = encode(record)
        self._write(record, line)
        self._seq += 1
        if self._publish is not None:
            self._publish(topic, line)
        return record

    def sync(self) -> None:
        """Return once all records are on the disk itself: before a checkpoint that names `seq`."""
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
        # Texts first: whoever reads the number in metrics.jsonl finds the texts already there.
        before = self._completions.size
        self._completions.write(line)
        try:
            self._metrics.write(
                encode({key: record[key] for key in ("seq", "time", "topic", "update", "problem")})
            )
        except RunError:
            self._completions.cut(before)
            raise


class LineFile:
    """An append-only file of JSON lines that never shows a torn line for longer than a write takes."""

    def __init__(self, path: Path, keeps: Callable[[bytes], bool], *, switch: str = "") -> None:
        """Open, and cut off what a run that goes on from a checkpoint will tell again.

        Args:
            path: Created where there is none.
            keeps: Whether a line belongs to what the checkpoint knows; the first that does not, or a torn
                one, is cut off with all after it. `ProtocolError`: the line is none of this file's.
            switch: The setting that does without the file, if there is one.
        """
        self.path = path
        self._switch = switch
        try:
            path.touch()
            #: Lines that were kept, and the file's bytes.
            self.kept, self.size = _head(path, keeps)
            os.truncate(path, self.size)
            # Unbuffered: a buffer would keep what a full disk refused and write it twice, later.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._failure("cannot be opened", error) from error

    def write(self, *lines: bytes) -> None:
        """Append lines, all of them whole or none at all."""
        data = b"".join(line + b"\n" for line in lines)
        rest = memoryview(data)
        try:
            while rest:  # a file system that is nearly full writes a part first
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            self.cut(self.size)
            raise self._failure("cannot be written", error) from error
        self.size += len(data)

    def cut(self, size: int) -> None:
        """Shorten to `size` bytes; needs no room on the disk."""
        self._file.truncate(size)
        self.size = size

    def sync(self) -> None:
        """Return once all lines are on the disk itself."""
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


def _is_told(line: bytes, *, last_seq: int) -> bool:
    """Whether the record is one of the first `last_seq`."""
    return bool(decode(line)["seq"] <= last_seq)


def _head(path: Path, keeps: Callable[[bytes], bool]) -> tuple[int, int]:
    """How many lines at the head of the file are kept, and their bytes.

    A line without its newline was torn by a kill. A whole line that is none of ours was put there by
    someone else, and is not ours to cut: `RunError`.
    """
    kept = size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                if not keeps(line):
                    break
            except ProtocolError as error:
                raise RunError(
                    f"{path}, line {kept + 1}: {error}; move the file away to resume without it"
                ) from error
            kept += 1
            size += len(line)
    return kept, size
