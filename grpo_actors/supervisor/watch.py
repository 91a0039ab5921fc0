"""Watch the progress of one child process (`progress`): what it works on, and for how long it has been silent.

A child that loads its model cannot report yet; until its first report, its output counts as progress. Only the time in
which this process looked counts as silence: if both were halted together, as with a paused container, the child had no
chance to report.
"""

import contextlib
import os
from dataclasses import dataclass, field

from grpo_actors.awake import LONGEST_LOOK_S
from grpo_actors.progress import LOADING_S


@dataclass
class Watch:
    """One child from its start to its end."""

    #: Read end of the pipe into which it reports, non-blocking; -1: it is closed.
    pipe: int
    #: Name of its work; empty while it has none.
    work: str = ""
    patience_s: float = LOADING_S
    #: Whether it has reported since its start.
    has_reported: bool = False
    #: Seconds since its last sign of progress.
    silent_s: float = 0.0
    #: Monotonic time of the last look.
    _looked_s: float | None = None
    #: What was read after the last line break.
    _partial_line: bytes = field(default=b"")

    @property
    def is_hung(self) -> bool:
        """Whether it has been silent for longer than its work may take."""
        return self.silent_s > self.patience_s

    @property
    def place(self) -> str:
        """Where it is, in words that follow others: `` at update 12``; empty between two works."""
        return f" at {self.work}" if self.work else "" if self.has_reported else " at its start"

    def look(self, now_s: float) -> None:
        """Read the reports since the last look; `now_s`: monotonic time."""
        if self._looked_s is not None:
            self.silent_s += min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        with contextlib.suppress(BlockingIOError):
            while self.pipe >= 0 and (data := os.read(self.pipe, 2**16)):
                self._take(data)

    def note_output(self) -> None:
        """Take note that the child has printed something."""
        if not self.has_reported:
            self.silent_s = 0.0

    def close(self) -> None:
        """Close the pipe; may be called twice."""
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def _take(self, data: bytes) -> None:
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if lines:
            patience, _, work = lines[-1].decode().partition(" ")
            self.patience_s, self.work, self.has_reported, self.silent_s = float(patience), work, True, 0.0
