"""A child process as the supervisor holds it: started, heard, started again later each time it dies young.

What a child prints comes through a pipe, so that it reaches the terminal above the progress display and
not through it. Knows no socket and no model.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from grpo_actors.process import EXIT_USAGE, LIFELINE

#: First pause before a dead actor is started again; doubled each time, back to the first after a
#: life of HEALTHY_S.
BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
HEALTHY_S = 60.0
#: A line longer than this is cut: a child that prints without end shall not fill this process.
MAX_LINE_BYTES = 2**16


@dataclass
class Actor:
    """One child process, and when it may be started again."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    respawns: bool
    #: Descriptors that it inherits, the lifeline aside.
    lent: tuple[int, ...] = ()
    process: "subprocess.Popen[bytes] | None" = None
    _started_s: float = 0.0
    _backoff_s: float = BACKOFF_S
    _start_after_s: float | None = None
    _printed: bytes = field(default=b"")
    _told: bool = False

    def start(self, lifeline: int) -> None:
        """Start it; `lifeline` is the read end of a pipe that closes when this process ends."""
        self._close_output()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "grpo_actors.supervisor.entry", *self.command],
            env={**os.environ, **self.environment, LIFELINE: str(lifeline)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[lifeline, *self.lent],
            # A group of its own: Ctrl-C reaches the supervisor only, also while the child still imports.
            process_group=0,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._started_s = time.monotonic()

    def send(self, number: int) -> None:
        """Send a signal, if it lives."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    @property
    def alive(self) -> bool:
        """Whether its process runs; reaps it when it has ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def returncode(self) -> int | None:
        """Of its last process; None: it runs, or was never started."""
        return None if self.process is None else self.process.poll()

    @property
    def is_hopeless(self) -> bool:
        """Whether it ended with the exit code of unusable input, after one line that says why."""
        return self.returncode == EXIT_USAGE

    def revive(self, lifeline: int) -> str | None:
        """Start it again if it died and its pause is over. Returns a line when it is found dead.

        What left of its own accord (exit 0) stays away, and so does what said that it cannot do its
        work as things are (exit 2): it would say so again for ever.
        """
        if not self.respawns or not self.returncode:
            return None
        if self.is_hopeless:
            told, self._told = self._told, True
            return None if told else f"{self.name} cannot do its work and is not started again"
        now_s = time.monotonic()
        if self._start_after_s is None:
            if now_s - self._started_s > HEALTHY_S:
                self._backoff_s = BACKOFF_S
            pause_s = self._backoff_s
            self._start_after_s = now_s + pause_s
            self._backoff_s = min(2 * pause_s, LONGEST_BACKOFF_S)
            return f"{self.name} {how_it_ended(self.returncode)}; starts again in {pause_s:.0f} s"
        if now_s >= self._start_after_s:
            self._start_after_s = None
            self.start(lifeline)
        return None

    def printed(self) -> Iterator[str]:
        """Whole lines that it has printed since the last call; does not wait.

        A progress bar, which returns to the line's start without ending it, leaves its last state only.
        """
        if self.process is None or self.process.stdout is None or self.process.stdout.closed:
            return
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.process.stdout.fileno(), 2**16):
                *lines, rest = (self._printed + data).split(b"\n")
                self._printed = rest[-MAX_LINE_BYTES:]
                for line in lines:
                    if text := line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip():
                        yield text

    def _close_output(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self._printed = b""

    def end(self, deadline_s: float) -> None:
        """Wait for it until `deadline_s` of the monotonic clock, then kill it; closes its output."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close_output()


def how_it_ended(code: int) -> str:
    """``was ended by signal 9`` or ``ended with 1``."""
    return f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
