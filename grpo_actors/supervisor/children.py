"""Run a child process of the supervisor: start it, read its output, restart it after a growing pause if it crashes.

A child whose work is not urgent (the evaluator, a tracker) runs at low priority: training takes what it needs of the
cores, and of a GPU that the processes share, and the child takes the rest.

A child's output comes through a pipe, so that the terminal shows it above the progress display. Knows no socket and
no model.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from grpo_actors.process import EXIT_USAGE, LIFELINE

#: Seconds before a crashed child is started again for the first time. The pause doubles with each crash, up to
#: LONGEST_BACKOFF_S, and starts again from BACKOFF_S after the child has lived for HEALTHY_S.
BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
HEALTHY_S = 60.0
#: A longer line is cut, so that a child that prints without end cannot fill this process's memory.
MAX_LINE_BYTES = 2**16
#: Added to this process's nice value for a child in the background. Linux gives nine such threads as much time as one
#: of training: enough to evaluate while training leaves no core idle, and too little to slow it down.
BACKGROUND_NICE = 10
#: Under CUDA MPS, makes the GPU prefer the kernels of the other processes (0: normal, 1: below normal).
BACKGROUND_ENVIRONMENT = {"CUDA_MPS_CLIENT_PRIORITY": "1"}


@dataclass
class Actor:
    """One child process, and when it may be started again."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    respawns: bool
    #: Whether other children come first when cores or a GPU are scarce.
    in_background: bool = False
    #: Descriptors that the child inherits besides the lifeline.
    inherited: tuple[int, ...] = ()
    #: What it waits for before it is started for the first time.
    waits_for: Literal["nothing", "learner", "update"] = "nothing"
    process: "subprocess.Popen[bytes] | None" = None
    #: Monotonic time of the last start.
    _started_s: float = 0.0
    #: Seconds of the next pause.
    _backoff_s: float = BACKOFF_S
    #: Monotonic time at which the pause ends; None if there is no pause.
    _start_after_s: float | None = None
    #: Output after the last line break.
    _partial_line: bytes = field(default=b"")
    #: Whether `revive` has reported that the child is not started again.
    _reported: bool = False

    def start(self, lifeline: int) -> None:
        """Start the child; `lifeline` is the read end of a pipe that closes when this process ends."""
        self._close_output()
        background = BACKGROUND_ENVIRONMENT if self.in_background else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "grpo_actors.supervisor.entry", *self.command],
            env={**os.environ, **self.environment, **background, LIFELINE: str(lifeline)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[lifeline, *self.inherited],
            # In a separate process group, Ctrl-C reaches the supervisor only, even while the child still imports.
            process_group=0,
        )
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
        """Whether the child ended with the exit code of unusable input. It has printed one line that says why."""
        return self.returncode == EXIT_USAGE

    def revive(self, lifeline: int) -> str | None:
        """Start the child again if it crashed and its pause is over; return a line when the crash is first noticed.

        A child that left by itself (exit code 0) is not started again. Nor is one that reported unusable input (exit
        code 2): it would fail again each time.
        """
        if not self.respawns or not self.returncode:
            return None
        if self.is_hopeless:
            reported, self._reported = self._reported, True
            return None if reported else f"{self.name} cannot do its work and is not started again"
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
        """Yield the complete lines printed since the last call, without waiting.

        Of a progress bar, which returns to the start of the line without ending it, only the last state is kept.
        """
        if self.process is None or self.process.stdout is None or self.process.stdout.closed:
            return
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.process.stdout.fileno(), 2**16):
                *lines, rest = (self._partial_line + data).split(b"\n")
                self._partial_line = rest[-MAX_LINE_BYTES:]
                for line in lines:
                    if text := line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip():
                        yield text

    def _close_output(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self._partial_line = b""

    def end(self, deadline_s: float) -> None:
        """Wait for the child until the monotonic time `deadline_s`, then kill it, and close its output."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close_output()


def how_it_ended(code: int) -> str:
    """Describe an exit code: ``was ended by signal 9`` or ``ended with 1``."""
    return f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
