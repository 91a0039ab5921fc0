"""Watch the progress of one child process (`progress`): what it works on, and for how long it has been silent.

A child that loads its model cannot report; until its first report, its output counts as progress. It has half an hour, as
nobody knows how long a load may take. But one that neither computes nor reads anything for `IDLE_S` will never end: a
deadlock, or a file system that does not answer.

Only the time in which this process looked counts as silence: if both were halted together, as with a paused container, the
child had no chance to report.
"""

import contextlib
import os
from dataclasses import dataclass, field

from grpo_actors.awake import LONGEST_LOOK_S
from grpo_actors.progress import LOADING_S
from grpo_actors.supervisor.activity import Activity, activity_of

#: A child that loads is idle if in so many seconds it has computed, read and written no more than this. Measured: the
#: threads of an idle ZeroMQ compute 0.01 s, a wait for a lock of the hub's cache, while another process downloads, 0.8 s.
IDLE_S, LIVE_S, LIVE_BYTES = 120.0, 0.1, 2**20
#: Seconds between two looks at what a silent child does.
PERIOD_S = 10.0


@dataclass
class Watch:
    """One child from its start to its end."""

    #: Read end of the pipe into which it reports, non-blocking.
    pipe: int
    #: Group of its processes.
    group: int
    #: Name of its work; empty while it has none.
    work: str = ""
    patience_s: float = LOADING_S
    #: Whether it has reported since its start.
    has_reported: bool = False
    #: Seconds since its last sign of progress.
    silent_s: float = 0.0
    #: What it had done when it was last seen to do anything; None: since its last sign of progress nobody looked.
    _seen: Activity | None = None
    #: Values of `silent_s` at that time, and at the next look at what it does.
    _seen_at_s: float = 0.0
    _next_at_s: float = 0.0
    #: Monotonic time of the last look.
    _looked_s: float | None = None
    #: What was read after the last line break.
    _partial_line: bytes = field(default=b"")

    @property
    def is_hung(self) -> bool:
        """Whether it has been silent for longer than its work may take, or does nothing though it should be loading."""
        return self._is_idle or self.silent_s > self.patience_s

    @property
    def limit_s(self) -> float:
        """Seconds of silence that it has, or would have had."""
        return IDLE_S if self._is_idle else self.patience_s

    @property
    def _loads(self) -> bool:
        return not self.work and self.patience_s == LOADING_S

    @property
    def _is_idle(self) -> bool:
        return self._seen is not None and self.silent_s - self._seen_at_s > IDLE_S

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
            while data := os.read(self.pipe, 2**16):
                self._take(data)
        if self._loads and self.silent_s >= self._next_at_s:
            self._look_at_activity()

    def note_output(self) -> None:
        """Take note that the child has printed something, if only, when it is hung, the stacks of its threads."""
        if not self.has_reported and not self.is_hung:
            self._begin_silence()

    def close(self) -> None:
        """Close the pipe; call this once, and `look` no more."""
        os.close(self.pipe)

    def _take(self, data: bytes) -> None:
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if lines:
            patience, _, work = lines[-1].decode().partition(" ")
            self.patience_s, self.work, self.has_reported = float(patience), work, True
            self._begin_silence()

    def _begin_silence(self) -> None:
        self.silent_s = self._seen_at_s = self._next_at_s = 0.0
        self._seen = None

    def _look_at_activity(self) -> None:
        self._next_at_s = self.silent_s + PERIOD_S
        now, seen = activity_of(self.group), self._seen
        if (
            now is None
            or seen is None
            or now.computed_s - seen.computed_s > LIVE_S
            or now.moved_bytes - seen.moved_bytes > LIVE_BYTES
        ):
            self._seen, self._seen_at_s = now, self.silent_s
