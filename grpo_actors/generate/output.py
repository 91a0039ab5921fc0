"""The results of a batch on disk: whole lines, and beside them what they were begun with.

    OUT             one JSON object a completion, in the order in which they were finished
    OUT.job.json    digest of the input, model and settings: only the same ones may go on with OUT

A kill at any moment leaves whole lines and at most one that is cut, which is dropped and sampled again.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from grpo_actors.errors import ConfigError, ProtocolError, RunError
from grpo_actors.observe.sinks import LineFile

#: Results that a failing machine (not a killed process) may lose: those of so many seconds.
SYNC_S = 5.0

Settings = Mapping[str, Any]


def job_file(output: Path) -> Path:
    """The file beside the results."""
    return output.with_name(f"{output.name}.job.json")


def refuse_other(output: Path, settings: Settings) -> None:
    """Refuse an output that was not begun with `settings`; those not given here are not looked at.

    Raises:
        ConfigError: it was begun with another input, model or setting, or is no batch's; or it cannot be made.
    """
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output must name a file in a folder that exists, got {output}")
    begun = _begun_with(output)
    if begun is None:
        if output.exists() and output.stat().st_size:
            raise ConfigError(
                f"{output}: exists, and no {job_file(output).name} says that a batch began it; choose another --output"
            )
        return
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ConfigError(
                f"{output}: was begun with {name} = {begun.get(name)!r}, got {value!r}; "
                "give the same again, or choose another --output"
            )


class Output:
    """The results while they are written; a file that was begun before is gone on with."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Open, and read what is done.

        Raises:
            ConfigError: as `refuse_other`.
            RunError: another process writes it, or the disk refuses.
        """
        refuse_other(path, settings)
        #: (index, sample) of each completion in the file.
        self.done: set[tuple[int, int]] = set()
        self._lock = self._begin(path, settings)
        before = path.stat().st_size if path.exists() else 0
        self._file = LineFile(path, self._keeps)
        #: Whether the last line was cut in the middle.
        self.mended = self._file.size < before
        self._synced_s = time.monotonic()

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append completions, all or none. `RunError`: no room."""
        self._file.write(*(json.dumps(record, ensure_ascii=False).encode() for record in records))
        if time.monotonic() - self._synced_s > SYNC_S:
            self._file.sync()
            self._synced_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.sync()
        self._file.close()
        os.close(self._lock)

    def _begin(self, path: Path, settings: Settings) -> int:
        """Write the job file unless it is there; returns its descriptor, which holds the lock."""
        try:
            descriptor = os.open(job_file(path), os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _begun_with(path) is None:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, (json.dumps(settings, indent=2) + "\n").encode())
                os.fsync(descriptor)
        except BlockingIOError:
            raise RunError(f"{path}: another process is writing it; wait for its end") from None
        except OSError as error:
            raise RunError(f"{job_file(path)}: cannot be written ({error.strerror})") from error
        return descriptor

    def _keeps(self, line: bytes) -> bool:
        try:
            record = json.loads(line)
            self.done.add((record["index"], record["sample"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"not a completion of a batch: {line[:40]!r}") from error
        return True


def _begun_with(output: Path) -> dict[str, Any] | None:
    """The settings in the job file; None: there is none, or its writer was killed before it wrote a result."""
    try:
        begun: dict[str, Any] = json.loads(job_file(output).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        if not output.exists() or not output.stat().st_size:
            return None
        raise ConfigError(f"{job_file(output)}: not JSON; choose another --output") from None
    return begun
