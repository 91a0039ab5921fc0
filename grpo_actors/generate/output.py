"""Write the results of a batch to disk, next to the settings that the batch was started with.

    OUT             one JSON object per completion, in the order in which they finished
    OUT.job.json    digest of the input, model and settings: only the same ones may continue OUT

A kill at any moment leaves complete lines and at most one cut line, which is dropped and sampled again.
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

#: Most seconds of results that a machine failure may lose; a killed process loses none.
SYNC_S = 5.0

Settings = Mapping[str, Any]


def job_file(output: Path) -> Path:
    """Return the path of the job file, next to the results."""
    return output.with_name(f"{output.name}.job.json")


def check_resumable(output: Path, settings: Settings) -> None:
    """Check that `output` is new or was started with `settings`; settings that are not given are not compared.

    Raises:
        ConfigError: it was started with another input, model or setting, is not a batch's, or cannot be created.
    """
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output must name a file in a folder that exists, got {output}")
    former = _former_settings(output)
    if former is None:
        if output.exists() and output.stat().st_size:
            raise ConfigError(
                f"{output}: exists, and no {job_file(output).name} says that a batch began it; choose another --output"
            )
        return
    for name, value in settings.items():
        if former.get(name) != value:
            raise ConfigError(
                f"{output}: was begun with {name} = {former.get(name)!r}, got {value!r}; "
                "give the same again, or choose another --output"
            )


class Output:
    """The file of results, open for writing; an unfinished file is continued."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Open the file and read which completions are done.

        Raises:
            ConfigError: as `check_resumable`.
            RunError: another process is writing the file, or it cannot be written.
        """
        check_resumable(path, settings)
        #: (index, sample) of each completion in the file.
        self.done: set[tuple[int, int]] = set()
        self._lock = self._lock_job(path, settings)
        former_size = path.stat().st_size if path.exists() else 0
        self._file = LineFile(path, self._keeps)
        #: Whether the last line was cut in the middle, and so was dropped.
        self.mended = self._file.size < former_size
        self._synced_s = time.monotonic()

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append completions, all or none.

        Raises:
            RunError: the disk is full.
        """
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

    def _lock_job(self, path: Path, settings: Settings) -> int:
        """Write the job file unless it exists; return its descriptor, which holds the lock."""
        try:
            descriptor = os.open(job_file(path), os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _former_settings(path) is None:
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


def _former_settings(output: Path) -> dict[str, Any] | None:
    """Read the settings in the job file; None: no job file, or its writer was killed before its first result."""
    try:
        former: dict[str, Any] = json.loads(job_file(output).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        if not output.exists() or not output.stat().st_size:
            return None
        raise ConfigError(f"{job_file(output)}: not JSON; choose another --output") from None
    return former
