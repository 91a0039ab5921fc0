"""Run a child process of the supervisor: start it, read its output, restart it after a growing pause if it crashes.

A child that makes no progress (`watch`) prints the stacks of its threads, is killed, and counts as crashed. One that dies
again and again at the same work with the same error gives that work up, or is given up itself, as is one that never gets
as far as its work.

A child whose work is not urgent (the evaluator, a tracker) runs at low priority: training takes what it needs of the
cores, and the child takes the rest. On a GPU all are equal: an evaluation is over sooner, and updates lose no more.

A child's output comes through a pipe, so that the terminal shows it above the progress display. Knows no socket and
no model.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from grpo_actors.process import BACKGROUND_NICE, EXIT_RANK_LOST, EXIT_USAGE, LIFELINE, PRINT_STACKS
from grpo_actors.progress import GIVEN_UP, PROGRESS
from grpo_actors.supervisor.deaths import MAX_DEATHS, MAX_STARTS, Deaths
from grpo_actors.supervisor.watch import Watch

#: Seconds before a crashed child is started again for the first time. The pause doubles with each crash, up to
#: LONGEST_BACKOFF_S, and starts again from BACKOFF_S after the child has lived for HEALTHY_S.
BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
HEALTHY_S = 60.0
#: Seconds of silence after which a child is named as what a run waits for.
QUIET_S = 10.0
#: Seconds that a child without progress has to print the stacks of its threads before it is killed.
STACKS_S = 1.0
#: Reads of a child's output at a time, so that one that prints without end cannot keep this process from the others.
READS_AT_ONCE = 16
#: A longer line is cut, so that a child that prints without end cannot fill this process's memory.
MAX_LINE_BYTES = 2**16


@dataclass
class Actor:
    """One child process, and when it may be started again."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    respawns: bool
    #: Whether other children come first when cores are scarce.
    in_background: bool = False
    #: Descriptors that the child inherits besides the lifeline.
    inherited: tuple[int, ...] = ()
    #: What it waits for before it is started for the first time.
    waits_for: Literal["nothing", "learner", "update"] = "nothing"
    #: Whether it reports its progress.
    is_watched: bool = False
    #: Whether it is started again after it hung, even if it does not respawn after a crash.
    respawns_if_hung: bool = False
    #: Whether it is started again after a signal has ended it, or another of its ranks.
    respawns_if_killed: bool = False
    #: Whether it goes on without work of which it died MAX_DEATHS times; else it is not started again.
    gives_up_work: bool = False
    process: "subprocess.Popen[bytes] | None" = None
    #: Of the last process; None if it is not watched.
    _watch: Watch | None = None
    #: Monotonic time at which the process was found to hang; None: it was not.
    _hung_since_s: float | None = None
    _deaths: Deaths = field(default_factory=Deaths)
    #: Work that is not to be tried again.
    _given_up: list[str] = field(default_factory=list)
    #: Whether the child itself is given up.
    _is_given_up: bool = False
    #: Monotonic time of the last start.
    _started_s: float = 0.0
    #: Seconds of the first pause after a crash.
    backoff_s: float = BACKOFF_S
    #: Seconds of the next pause; None: `backoff_s`.
    _next_backoff_s: float | None = None
    #: Monotonic time at which the pause ends; None if there is no pause.
    _start_after_s: float | None = None
    #: Output after the last line break.
    _partial_line: bytes = field(default=b"")
    #: Lines not shown yet, and the last line of all.
    _lines: deque[str] = field(default_factory=deque)
    _last_line: str = ""
    #: Whether `revive` has reported that the child is not started again.
    _reported: bool = False

    def start(self, lifeline: int) -> None:
        """Start the child; `lifeline` is the read end of a pipe that closes when this process ends."""
        self._close_pipes()
        self._hung_since_s = None
        environment = {**os.environ, **self.environment, LIFELINE: str(lifeline)}
        if self._given_up:
            environment[GIVEN_UP] = "\n".join(self._given_up)
        inherited = [lifeline, *self.inherited]
        with contextlib.ExitStack() as until_started:
            if self.is_watched:
                read_end, write_end = os.pipe()
                until_started.callback(os.close, write_end)
                os.set_blocking(read_end, False)
                environment[PROGRESS] = str(write_end)
                inherited.append(write_end)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grpo_actors.supervisor.entry", *self.command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                # In a separate process group, Ctrl-C reaches the supervisor only, even while the child still imports.
                process_group=0,
            )
        if self.is_watched:
            self._watch = Watch(read_end, self.process.pid)
        if self.in_background:
            # Set from here, because the child computes for seconds, importing, before its own code runs.
            nice = os.getpriority(os.PRIO_PROCESS, 0) + BACKGROUND_NICE
            with contextlib.suppress(ProcessLookupError):  # it has already ended
                os.setpriority(os.PRIO_PGRP, self.process.pid, nice)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._started_s = time.monotonic()

    def send(self, number: int) -> None:
        """Send a signal if the child is alive."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def halt(self) -> None:
        """Stop the child and what it has started in its group, until `go_on`."""
        self._send_to_group(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a stopped child go on."""
        self._send_to_group(signal.SIGCONT)

    def kill(self) -> None:
        """End the child and what it has started in its group, at once."""
        self._send_to_group(signal.SIGKILL)

    def _send_to_group(self, number: int) -> None:
        if self.alive and self.process is not None:
            # macOS raises PermissionError if only a zombie is left in the group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    @property
    def alive(self) -> bool:
        """Whether the process runs. Reaps the process if it has ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit code of the last process; None while it runs and before the first start."""
        return None if self.process is None else self.process.poll()

    @property
    def is_hopeless(self) -> bool:
        """Whether the child is given up, or ended with the exit code of unusable input and one line that says why."""
        return self._is_given_up or self.returncode == EXIT_USAGE

    @property
    def is_over(self) -> bool:
        """Whether the child has ended and will not be started again."""
        return self.returncode is not None and (
            not self.returncode or self.is_hopeless or not self._respawns_now
        )

    @property
    def _has_hung(self) -> bool:
        """Whether the last process hung."""
        return self._hung_since_s is not None

    @property
    def _respawns_now(self) -> bool:
        return (
            self.respawns
            or (self.respawns_if_hung and self._has_hung)
            or (self.respawns_if_killed and _was_killed(self.returncode))
        )

    @property
    def how_it_ended(self) -> str:
        """Describe the end of the last process: ``ended with 1``."""
        assert self.returncode is not None
        if self._watch is not None and self._has_hung:
            return f"made no progress for {self._watch.limit_s:.0f} s"
        return how_it_ended(self.returncode)

    @property
    def trouble(self) -> str | None:
        """What keeps the child from its work, in words that follow its name; None if nothing does."""
        if self._start_after_s is not None:
            pause_s = max(0.0, self._start_after_s - time.monotonic())
            return f"{self.how_it_ended} and starts again in {pause_s:.0f} s"
        if self.returncode is not None:
            return "is not started again" if self.is_hopeless else None
        if self._watch is None:
            return None
        if not self._watch.has_reported:
            return "still starts"
        if self._watch.silent_s > QUIET_S:
            return f"is silent for {self._watch.silent_s:.0f} s{self._watch.place}"
        return None

    def end_if_hung(self) -> str | None:
        """Kill the child if it makes no progress; return a line when that is first noticed.

        It prints the stacks of its threads first. Call this often: each call takes one step.
        """
        if self._watch is None or not self.alive:
            return None
        now_s = time.monotonic()
        if self._hung_since_s is not None:
            if now_s - self._hung_since_s > STACKS_S:
                self.kill()
            return None
        self._watch.look(now_s)
        if not self._watch.is_hung:
            return None
        self._hung_since_s = now_s
        self.send(PRINT_STACKS)
        self.send(signal.SIGCONT)  # a process that was stopped handles the other signal only now
        return f"{self.name} has made no progress for {self._watch.silent_s:.0f} s{self._watch.place}; its threads:"

    def revive(self, lifeline: int) -> str | None:
        """Start the child again if it crashed and its pause is over; return a line when the crash is first noticed.

        A child that left by itself (exit code 0) is not started again. Nor is one that reported unusable input (exit
        code 2), or that was given up: it would fail again each time.
        """
        if not self.returncode or not self._respawns_now:
            return None
        if self.is_hopeless:
            reported, self._reported = self._reported, True
            return None if reported else f"{self.name} cannot do its work and is not started again"
        if self._start_after_s is None:
            return self._note_death()
        if time.monotonic() >= self._start_after_s:
            self._start_after_s = None
            self.start(lifeline)
        return None

    def _note_death(self) -> str:
        """Decide what follows from a death, and return the line that says it."""
        self._read_output()
        if self._watch is not None:
            self._watch.look(time.monotonic())
        how, error = self.how_it_ended, "" if self._has_hung else self._last_line
        killed = self.returncode in (-signal.SIGKILL, -signal.SIGTERM)
        if self._watch is None:
            return f"{self.name} {how}; starts again in {self._pause():.0f} s"
        cannot_start = self._deaths.repeat_start(worked=self._watch.has_reported, killed=killed)
        if not self._deaths.repeat(self._watch.work, how, error, killed=killed):
            if not cannot_start:
                return f"{self.name} {how}; starts again in {self._pause():.0f} s"
            self._is_given_up = self._reported = True
            reason = f": {error}" if error else ""
            return f"{self.name} cannot start: it {how}, the last of {MAX_STARTS} times{reason}; it is not started again"
        times = f"{how}, {MAX_DEATHS} times in a row{self._watch.place}" + (f": {error}" if error else "")
        if self._watch.work and self.gives_up_work:
            self._given_up.append(self._watch.work)
            pause_s = self._pause()
            return f"{self.name} gives up {self._watch.work}: it {times}; starts again in {pause_s:.0f} s"
        self._is_given_up = self._reported = True
        return f"{self.name} {times}; it is not started again"

    def _pause(self) -> float:
        """Begin the pause before the next start, and return its seconds."""
        now_s = time.monotonic()
        healthy = now_s - self._started_s > HEALTHY_S
        pause_s = self.backoff_s if healthy or self._next_backoff_s is None else self._next_backoff_s
        self._start_after_s = now_s + pause_s
        self._next_backoff_s = min(2 * pause_s, LONGEST_BACKOFF_S)
        return pause_s

    def printed(self) -> Iterator[str]:
        """Yield the complete lines printed since the last call, without waiting.

        Of a progress bar, which returns to the start of the line without ending it, only the last state is kept.
        """
        self._read_output()
        while self._lines:
            yield self._lines.popleft()

    def _read_output(self) -> None:
        if self.process is None or self.process.stdout is None or self.process.stdout.closed:
            return
        with contextlib.suppress(BlockingIOError):
            for _ in range(READS_AT_ONCE):
                data = os.read(self.process.stdout.fileno(), 2**16)
                if not data:
                    return
                if self._watch is not None:
                    self._watch.note_output()
                *lines, rest = (self._partial_line + data).split(b"\n")
                self._partial_line = rest[-MAX_LINE_BYTES:]
                for line in lines:
                    if text := line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip():
                        self._last_line = text
                        self._lines.append(text)

    def _close_pipes(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self._partial_line, self._last_line = b"", ""
        if self._watch is not None:
            self._watch.close()

    def end(self, deadline_s: float) -> None:
        """Wait for the child until the monotonic time `deadline_s`, then kill it, and close its pipes."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self._close_pipes()


def _was_killed(code: int | None) -> bool:
    """Return whether a signal that this process does not send has ended a child, or one of its ranks."""
    return code == EXIT_RANK_LOST or (code is not None and code < 0 and code != -signal.SIGTERM)


def how_it_ended(code: int) -> str:
    """Describe an exit code: ``was ended by signal 9`` or ``ended with 1``."""
    if code == EXIT_RANK_LOST:
        return "lost one of its ranks"
    return f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
