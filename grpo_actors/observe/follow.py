"""A run's records in order and each once, from its files and its events socket together.

The files are complete but must be looked at; the socket wakes but may have lost something. A record is
whole in the file before it is published, so an event is a reason to read the file, and is itself used
only where the file lacks it (another host, ``log_jsonl = false``). Knows no socket, only something to
`receive` from.
"""

import os
import time
from pathlib import Path
from typing import BinaryIO, Protocol, Self

from grpo_actors.errors import ProtocolError
from grpo_actors.observe.records import Record, decode
from grpo_actors.rundir.folder import COMPLETIONS_FILE, METRICS_FILE


class Source(Protocol):
    """Where events come from; `grpo_actors.transport.events.EventSubscriber` is one."""

    def receive(self, timeout_s: float | None) -> tuple[str, bytes] | None:
        """The next event as (topic, bytes), or None when the time is up."""
        ...


class Follower:
    """Joins the files of `folder` and the events of `source`; either may be None.

    A resumed run numbers on from its checkpoint. Such records have a number already seen but a time
    never seen, and are given out: numbers may fall back, with a ``start``, and then rise again.
    """

    #: Records that neither came nor stand in a file, since the first one seen.
    lost: int = 0
    #: Events that were no record and were dropped.
    malformed: int = 0

    def __init__(self, source: Source | None, folder: Path | None) -> None:
        self.source = source
        self._files = None if folder is None else HistoryReader(folder)
        self._held: Record | None = None
        self._last_seq = 0
        # The newest time, not the last: a clock that is set back must not make old records look new.
        self._newest_time = float("-inf")

    def receive(self, timeout_s: float) -> Record | None:
        """The next record, or None when there was none within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            record = self._from_files() or self._from_hand()
            if record is not None:
                return record
            left_s = max(deadline - time.monotonic(), 0.0)
            if self.source is None or not self._listen(left_s):
                # Also without an event: the last ones before a stop may be the ones that were lost.
                return self._from_files()

    def close(self) -> None:
        """Close the files; the source is the caller's."""
        if self._files is not None:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, timeout_s: float) -> bool:
        """Take one event into the hand; False when none came."""
        assert self.source is not None
        event = self.source.receive(timeout_s)
        if event is None:
            return False
        try:
            record = decode(event[1])
        except ProtocolError:
            self.malformed += 1
            return True
        if self._is_new(record):
            self._held = record
            if record["seq"] <= self._last_seq and self._files is not None:
                self._files.rewind()  # the run was resumed: its file was cut and has grown anew
        return True

    def _from_files(self) -> Record | None:
        while self._files is not None and (record := self._files.read()) is not None:
            if self._is_new(record):
                return self._given_out(record)
        return None

    def _from_hand(self) -> Record | None:
        record, self._held = self._held, None
        if record is None or not self._is_new(record):
            return None
        if self._last_seq:
            self.lost += max(record["seq"] - self._last_seq - 1, 0)
        return self._given_out(record)

    def _is_new(self, record: Record) -> bool:
        return bool(record["seq"] > self._last_seq or record["time"] > self._newest_time)

    def _given_out(self, record: Record) -> Record:
        self._last_seq = record["seq"]
        self._newest_time = max(self._newest_time, record["time"])
        return record


class HistoryReader:
    """Reads the records of a run folder, also while they are written; samples with their texts."""

    def __init__(self, folder: Path) -> None:
        self._metrics = _GrowingFile(folder / METRICS_FILE)
        self._completions = _GrowingFile(folder / COMPLETIONS_FILE)
        self._texts: Record | None = None

    def read(self) -> Record | None:
        """The next whole record, or None when there is none yet."""
        rewinds = self._metrics.rewinds
        record = self._metrics.read()
        if self._metrics.rewinds != rewinds:
            self._rewind_texts()
        if record is None or record["topic"] != "sample":
            return record
        return self._with_texts(record)

    def rewind(self) -> None:
        """Read from the first record again."""
        self._metrics.rewind()
        self._rewind_texts()

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._completions.close()

    def _rewind_texts(self) -> None:
        self._completions.rewind()
        self._texts = None

    def _with_texts(self, record: Record) -> Record:
        """The same record out of completions.jsonl, which is in the same order and written first."""
        while self._texts is None or self._texts["seq"] < record["seq"]:
            self._texts = self._completions.read()
            if self._texts is None:
                return record
        return self._texts if self._texts["seq"] == record["seq"] else record


class _GrowingFile:
    """Whole lines of a file that may not exist yet, may grow, and may be cut and grow anew."""

    #: How often reading began again because the file had been cut.
    rewinds: int = 0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._offset = 0
        self._last_line = b""
        # Only then is there a pause in which the file may be cut.
        self._was_at_end = False

    def read(self) -> Record | None:
        """The next record; lines that are none are passed over."""
        if self._file is None:
            if not self._path.exists():
                return None
            self._file = self._path.open("rb")
        if self._was_at_end and not self._is_the_same(self._file):
            self.rewind()
        while (line := self._file.readline()).endswith(b"\n"):
            self._was_at_end = False
            self._offset += len(line)
            self._last_line = line
            try:
                return decode(line)
            except ProtocolError:
                continue
        self._was_at_end = True
        return None

    def rewind(self) -> None:
        self.rewinds += 1
        self._offset = 0
        self._last_line = b""
        self._was_at_end = False
        if self._file is not None:
            self._file.seek(0)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_the_same(self, file: BinaryIO) -> bool:
        """Whether the line read last still stands where it stood; leaves `file` behind it.

        Its size alone tells nothing: the file may have been cut and have grown longer than before.
        """
        size = len(self._last_line)
        file.seek(self._offset)
        # Past the reader's buffer, which may hold what stood there before.
        return os.pread(file.fileno(), size, self._offset - size) == self._last_line
