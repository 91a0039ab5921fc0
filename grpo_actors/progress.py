"""Report progress to the supervisor, which replaces a process that makes none (`supervisor.watch`).

The loop that does the work says what it works on and how long that may take, then reports each step::

    begin_work("update 12", patience_s=120)
    for micro_batch in batches:
        ...
        report_progress()

No thread reports: a process whose loop hangs must fall silent even if its sockets and threads live. A process that was
started by hand reports to nobody, and each call returns at once. Imports nothing heavy.
"""

import contextlib
import os
import time
from collections import deque
from statistics import median

#: Environment variable with the descriptor of a pipe's write end. The supervisor reads the other end.
PROGRESS = "GRPO_ACTORS_PROGRESS"
#: Environment variable with the work that the supervisor has given up, one item per line: predecessors died of it.
GIVEN_UP = "GRPO_ACTORS_GIVEN_UP"

#: Seconds without progress after which a process counts as hung. Long, because a first step on a GPU may compile for a
#: minute. The learner measures the silence of its peers by it, the supervisor that of its children.
LOST_S = float(os.environ.get("GRPO_ACTORS_LOST_S", "120"))
#: The same for what cannot report on its way: to load a model, perhaps over a network, to write a checkpoint of any
#: size, and the first step of all. A limit that is too short would end such a process again and again.
LOADING_S = 1800.0
#: A step may take this many times as long as the median of the last `STEPS`.
LONG_STEP = 10
STEPS = 101
#: Seconds that a reward may take beyond its time limit, until its process is killed.
SCORING_SLACK_S = 5.0
#: Least seconds between two reports of the same work.
PERIOD_S = 0.1


class Pace:
    """The pace of a process whose steps are alike, and how long the next step may take."""

    def __init__(self) -> None:
        self._steps_s: deque[float] = deque(maxlen=STEPS)

    @property
    def patience_s(self) -> float:
        """The longest time that a step may take, in seconds; the first one may compile."""
        return max(LOST_S, LONG_STEP * median(self._steps_s)) if self._steps_s else LOADING_S

    def add(self, step_s: float) -> None:
        """Record the seconds of a step."""
        self._steps_s.append(step_s)


class _Reporter:
    """This process's end of the pipe."""

    def __init__(self) -> None:
        # Taken away: this process's own children inherit the environment, but not the pipe.
        pipe = os.environ.pop(PROGRESS, None)
        self._pipe = None if pipe is None else int(pipe)
        self._work, self._patience_s = "", LOADING_S
        self._next_s = 0.0
        if self._pipe is not None:
            os.set_blocking(self._pipe, False)

    def begin(self, work: str, patience_s: float) -> None:
        if (work, patience_s) != (self._work, self._patience_s):
            self._work, self._patience_s, self._next_s = work, patience_s, 0.0
        self.report()

    def report(self) -> None:
        if self._pipe is None or (now_s := time.monotonic()) < self._next_s:
            return
        self._next_s = now_s + PERIOD_S
        # A full pipe: the supervisor is stopped and has unread reports. A broken one: it is gone.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, f"{self._patience_s} {self._work}\n".encode())


_reporter = _Reporter()


def begin_work(work: str, patience_s: float = LOST_S) -> None:
    """Report what this process works on from now on, and the longest time between two reports of progress, in seconds.

    Args:
        work: One line that names the work. A process that dies repeatedly at work of one name is told to give it up.
        patience_s: After so many seconds without a report the supervisor replaces this process.
    """
    _reporter.begin(work, patience_s)


def scoring_patience_s(reward_timeout_s: float) -> float:
    """Return the patience for a loop that also calls rewards: it is silent while one of them runs."""
    return max(LOST_S, reward_timeout_s + SCORING_SLACK_S)


def report_progress() -> None:
    """Report that the work goes on. Cheap enough for every step of a loop."""
    _reporter.report()


def given_up() -> frozenset[str]:
    """Return the names of the work that must not be tried again."""
    return frozenset(os.environ.get(GIVEN_UP, "").splitlines())
