"""Decide by measurement how many rollout workers pay: updates in, decisions out.

The search only climbs. Measure a window of updates. If the learner waits and there is room, add a worker on trial and
measure again. Keep the worker if the rate rose by a tenth; otherwise stop it and decide nothing more:

    1 worker:   100 tokens/s, the learner waits 60 %  → add one
    2 workers:  180 tokens/s, the learner waits 40 %  → keep it, add one
    3 workers:  185 tokens/s                          → stop it, settled at 2

Each number is tried once, so the number cannot oscillate. Knows no clock, no socket and no process.

The rate counts sampled tokens, because longer completions and replaced groups change it less than they change the time
of an update. A window has three blocks, and its rate is the median of the blocks' rates. So one block with a pause in
it (an evaluation at the same time, a compilation) decides nothing. Within a block the rate is the mean, not the median:
n workers whose batches end together make n updates at once, one long and n - 1 short, so the median of single updates
is meaningless. Therefore a block is a multiple of n updates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from grpo_actors.rundir.decisions import Decision

#: A learner that waits for at most this share of its time has enough workers.
WAIT_SHARE = 0.1
#: A worker is kept if the rate with it is at least this many times the rate without it.
KEEP_GAIN = 1.1
#: Number of updates that are not measured at the start (the first ones compile) and after a worker joined or left.
SKIPPED_UPDATES = 2
#: Number of blocks in a window.
BLOCKS = 3
#: Minimum number of updates in a block, and its minimum duration in seconds.
BLOCK_UPDATES = 4
BLOCK_S = 1.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of one update."""

    update_s: float
    #: Share of that time in which the learner waited for groups.
    wait_share: float
    #: Sampled tokens per second that arrived from all workers together.
    tokens_per_s: float


@dataclass(slots=True)
class _Sums:
    """Sums over the consecutive updates of one block."""

    updates: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    tokens: float = 0.0

    def add(self, update: Measurement) -> None:
        self.updates += 1
        self.seconds += update.update_s
        self.waited_s += update.wait_share * update.update_s
        self.tokens += update.tokens_per_s * update.update_s

    def is_complete(self, period: int) -> bool:
        return self.updates >= BLOCK_UPDATES and self.updates % period == 0 and self.seconds >= BLOCK_S


@dataclass(slots=True)
class Headcount:
    """The number of the supervisor's own workers. Workers attached by hand change the rates but are not counted."""

    workers: int
    #: True when nothing is decided any more.
    settled: bool = False
    #: True while the worker on trial has not delivered a group yet, because it loads its model.
    loading: bool = False
    #: Rate without the worker on trial, in tokens/s; None if no worker is on trial.
    _before: float | None = None
    #: Number of updates still to skip.
    _to_skip: int = SKIPPED_UPDATES
    #: The blocks of the current window; the last one is being filled.
    _blocks: list[_Sums] = field(default_factory=lambda: [_Sums()])

    @property
    def kept(self) -> int:
        """Number of workers that are known to pay, without the one on trial."""
        return self.workers - (self._before is not None)

    def record_update(self, update: Measurement, *, active: int, room: Callable[[], int]) -> Decision | None:
        """Record one update; return a decision at the end of a window.

        Args:
            update: Its figures.
            active: Number of workers that deliver groups, attached ones included.
            room: Returns the most workers of the supervisor's own that there is room for.
        """
        if self.settled or self.loading:
            return None
        if self._to_skip:
            self._to_skip -= 1
            return None
        self._blocks[-1].add(update)
        if not self._blocks[-1].is_complete(max(1, active)):
            return None
        if len(self._blocks) < BLOCKS:
            self._blocks.append(_Sums())
            return None
        return self._decide(room)

    def trial_started(self) -> None:
        """Start to measure: the worker on trial has delivered its first group."""
        self.loading = False
        self._restart()

    def workers_changed(self) -> Decision | None:
        """Start a new window: another worker joined or left, so rates before and after cannot be compared.

        A worker on trial is stopped without a verdict. The search continues with the next measurements.
        """
        self._restart()
        if self._before is None or self.settled:
            return None
        return self._remove_worker("other workers joined or left during its trial; a new trial follows")

    def worker_died(self, how: str) -> Decision:
        """Settle at one worker less: one of several died, perhaps for lack of memory."""
        self.settled = True
        return self._remove_worker(f"a worker {how}")

    def _decide(self, room: Callable[[], int]) -> Decision:
        blocks = self._blocks
        rate = median(block.tokens / block.seconds for block in blocks)
        updates, seconds = sum(block.updates for block in blocks), sum(block.seconds for block in blocks)
        waits = sum(block.waited_s for block in blocks) / seconds
        reason = f"the learner waits {waits:.0%} of an update of {seconds / updates:.2f} s"
        if self._before is not None:
            gain = f"one worker more gave {rate / self._before:.2f} times the rate"
            if rate < KEEP_GAIN * self._before:
                self.settled = True
                return self._remove_worker(gain)
            reason, self._before = f"{gain}; {reason}", None
        if waits > WAIT_SHARE and rate > 0 and self.workers < room():
            self._before, self.loading = rate, True
            self.workers += 1
            return Decision(self.workers - 1, self.workers, reason)
        self.settled = True
        full = ", and there is room for no more" if waits > WAIT_SHARE else ""
        return Decision(self.workers, self.workers, reason + full)

    def _remove_worker(self, reason: str) -> Decision:
        self.workers -= 1
        self._before, self.loading = None, False
        return Decision(self.workers + 1, self.workers, reason)

    def _restart(self) -> None:
        self._blocks, self._to_skip = [_Sums()], SKIPPED_UPDATES
