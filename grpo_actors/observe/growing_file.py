"""Read the complete lines of a file that may not exist yet, may grow, and may be truncated and grow again."""

import os
from pathlib import Path
from typing import BinaryIO


class GrowingFile:
    """A reader of lines; a torn line at the end is not one yet."""

    #: How often reading started again because the file had been truncated.
    rewinds: int = 0
    #: Bytes up to the end of the last line read.
    offset: int = 0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._last_line = b""
        # The file may be truncated only during a pause, which begins at its end.
        self._was_at_end = False

    def read(self) -> bytes | None:
        """Return the next complete line with its newline, or None if there is none yet."""
        if self._file is None:
            if not self._path.exists():
                return None
            self._file = self._path.open("rb")
        if self._was_at_end and not self._is_unchanged(self._file):
            self.rewind()
        line = self._file.readline()
        self._was_at_end = not line.endswith(b"\n")
        if self._was_at_end:
            return None
        self.offset += len(line)
        self._last_line = line
        return line

    def rewind(self) -> None:
        """Start again from the first line."""
        self.rewinds += 1
        self.offset = 0
        self._last_line = b""
        self._was_at_end = False
        if self._file is not None:
            self._file.seek(0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_unchanged(self, file: BinaryIO) -> bool:
        """Return whether the last line read is still where it was; leaves `file` positioned after it.

        The file's size alone is not enough: it may have been truncated and have grown longer than before.
        """
        size = len(self._last_line)
        file.seek(self.offset)
        # `pread` bypasses the reader's buffer, which may hold the former bytes.
        return os.pread(file.fileno(), size, self.offset - size) == self._last_line
