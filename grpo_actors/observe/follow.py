"""Read a run's records in order, each once, from its files and its events socket together.

The files are complete, but must be polled. The socket wakes the reader, but may lose events. A record is
complete in the file before it is published, so an event is a signal to read the file. The event itself
is used only where the file lacks the record (another host, ``log_jsonl = false``). This module has no
socket, only a `Source` to `receive` from.
"""

import time
from pathlib import Path
from typing import Protocol, Self

from grpo_actors.errors import ProtocolError
from grpo_actors.observe.growing_file import GrowingFile
from grpo_actors.observe.reading import Reading
from grpo_actors.observe.records import Record, decode
from grpo_actors.rundir.folder import COMPLETIONS_FILE, METRICS_FILE


class Source(Protocol):
    """A source of events, such as `grpo_actors.transport.events.EventSubscriber`."""

    def receive(self, timeout_s: float | None) -> tuple[str, bytes] | None:
        """Return the next event as (topic, bytes), or None after `timeout_s`."""
        ...


class Follower:
    """The records of one run, merged from the files of `folder` and the events of `source`; either may be None.

    A resumed run continues numbering from its checkpoint. Its records repeat numbers in a new session
    (`reading`), so they are returned too: numbers may fall back, at a ``start``, and then rise again.
    """

    #: Records missing from both events and files, since the first one seen.
    lost: int = 0
    #: Events that were not a record and were dropped.
    malformed: int = 0

    def __init__(self, source: Source | None, folder: Path | None) -> None:
        self.source = source
        self._files = None if folder is None else HistoryReader(folder)
        self._pending: Record | None = None
        self._reading = Reading()

    def receive(self, timeout_s: float) -> Record | None:
        """Return the next record, or None if there is none within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            record = self._from_files() or self._from_event()
            if record is not None:
                return record
            left_s = max(deadline - time.monotonic(), 0.0)
            if self.source is None or not self._receive_event(left_s):
                # Read the files even without an event: the last events before a stop may be lost.
                return self._from_files()

    def close(self) -> None:
        """Close the files, but not the source, which belongs to the caller."""
        if self._files is not None:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive_event(self, timeout_s: float) -> bool:
        """Receive one event and keep it in `_pending` if it is new; False if none came."""
        assert self.source is not None
        event = self.source.receive(timeout_s)
        if event is None:
            return False
        try:
            record = decode(event[1])
        except ProtocolError:
            self.malformed += 1
            return True
        if self._reading.is_new(record):
            self._pending = record
        return True

    def _from_files(self) -> Record | None:
        while self._files is not None and (record := self._files.read()) is not None:
            if self._reading.is_new(record):
                self._reading.mark(record)
                return record
        return None

    def _from_event(self) -> Record | None:
        record, self._pending = self._pending, None
        if record is None or not self._reading.is_new(record):
            return None
        if self._reading.seq:
            self.lost += max(record["seq"] - self._reading.seq - 1, 0)
        self._reading.mark(record)
        return record


class HistoryReader:
    """A reader of the records in a run folder, also while they are written; samples come with their texts."""

    def __init__(self, folder: Path) -> None:
        self._metrics = GrowingFile(folder / METRICS_FILE)
        self._completions = GrowingFile(folder / COMPLETIONS_FILE)
        self._texts: Record | None = None

    def read(self) -> Record | None:
        """Return the next complete record, or None if there is none yet."""
        rewinds = self._metrics.rewinds
        record = _next_record(self._metrics)
        if self._metrics.rewinds != rewinds:
            self._rewind_texts()
        if record is None or record["topic"] != "sample":
            return record
        return self._with_texts(record)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._completions.close()

    def _rewind_texts(self) -> None:
        self._completions.rewind()
        self._texts = None

    def _with_texts(self, record: Record) -> Record:
        """Return the same record from completions.jsonl, which has the same order and is written first."""
        while self._texts is None or self._texts["seq"] < record["seq"]:
            self._texts = _next_record(self._completions)
            if self._texts is None:
                return record
        return self._texts if self._texts["seq"] == record["seq"] else record


def _next_record(file: GrowingFile) -> Record | None:
    """Return the next record of a file; skip lines that are not a record."""
    while (line := file.read()) is not None:
        try:
            return decode(line)
        except ProtocolError:
            continue
    return None
