"""How many rollout workers pay, decided by measurement: updates in, decisions out.

One climbs: measure a window of updates; if the learner waits and there is room, add a worker; measure again;
keep it if the rate rose, else send it home and settle for good. A number is judged once, so nothing can
oscillate. Knows no clock, no socket and no process.

The rate is that of sampled tokens, which longer completions and replaced groups change less than the time of
an update. A window is three blocks, and its rate the median of theirs: one block with a pause in it (an
evaluation beside it, a compilation) decides nothing. Within a block it is the mean, not the median: n workers
whose batches end together make n updates at once, one long and n - 1 short, whose median says nothing. A
block is therefore a multiple of n updates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from grpo_actors.rundir.decisions import Decision

#: A learner that waits less than this share of its time has workers enough.
WAIT_SHARE = 0.1
#: A worker stays if the rate with it is at least so many times the rate without.
KEEP_GAIN = 1.1
#: Updates that are not measured, at the start (the first ones compile) and whenever a worker came or went.
SKIPPED_UPDATES = 2
BLOCKS = 3
#: A block's least number of updates, and its least duration in seconds.
BLOCK_UPDATES = 4
BLOCK_S = 1.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One update."""

    update_s: float
    #: Share of it in which the learner waited for groups.
    wait_share: float
    #: Sampled tokens that came in, of all workers together.
    tokens_per_s: float


@dataclass(slots=True)
class _Sums:
    """Consecutive updates, added up."""

    updates: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    tokens: float = 0.0

    def add(self, update: Measurement) -> None:
        self.updates += 1
        self.seconds += update.update_s
        self.waited_s += update.wait_share * update.update_s
        self.tokens += update.tokens_per_s * update.update_s

    def is_whole(self, period: int) -> bool:
        return self.updates >= BLOCK_UPDATES and self.updates % period == 0 and self.seconds >= BLOCK_S


@dataclass(slots=True)
class Headcount:
    """The supervisor's own workers; those that were attached by hand change the rates, and are not counted."""

    workers: int
    #: Nothing is decided any more.
    settled: bool = False
    #: The worker on trial has not delivered yet: it loads its model.
    loading: bool = False
    #: Rate without the worker that is on trial; None: none is.
    _before: float | None = None
    _to_skip: int = SKIPPED_UPDATES
    _blocks: list[_Sums] = field(default_factory=lambda: [_Sums()])

    @property
    def kept(self) -> int:
        """Workers that are known to pay: without the one on trial."""
        return self.workers - (self._before is not None)

    def measured(self, update: Measurement, *, at_work: int, room: Callable[[], int]) -> Decision | None:
        """One update was done, by `at_work` workers, attached ones included; there is room for `room()` of ours."""
        if self.settled or self.loading:
            return None
        if self._to_skip:
            self._to_skip -= 1
            return None
        self._blocks[-1].add(update)
        if not self._blocks[-1].is_whole(max(1, at_work)):
            return None
        if len(self._blocks) < BLOCKS:
            self._blocks.append(_Sums())
            return None
        blocks = self._blocks
        self._restart(skip=0)
        return self._decide(blocks, room)

    def arrived(self) -> None:
        """The worker on trial has delivered its first group."""
        self.loading = False
        self._restart()

    def disturbed(self) -> Decision | None:
        """Another worker came or went, so rates before and after cannot be compared.

        A worker on trial goes home, unjudged, and the climb goes on from what is measured now.
        """
        self._restart()
        if self._before is None or self.settled:
            return None
        return self._remove_worker("others came or went during its trial; it is measured again")

    def died(self, how: str) -> Decision:
        """One of several workers died, perhaps for lack of memory: the rest is the most that there is room for."""
        self.settled = True
        return self._remove_worker(f"a worker {how}")

    def _decide(self, blocks: list[_Sums], room: Callable[[], int]) -> Decision:
        rate = median(block.tokens / block.seconds for block in blocks)
        updates, seconds = sum(block.updates for block in blocks), sum(block.seconds for block in blocks)
        waits = sum(block.waited_s for block in blocks) / seconds
        said = f"the learner waits {waits:.0%} of an update of {seconds / updates:.2f} s"
        if self._before is not None:
            gain = f"one worker more gave {rate / self._before:.2f} times the rate"
            if rate < KEEP_GAIN * self._before:
                self.settled = True
                return self._remove_worker(gain)
            said, self._before = f"{gain}; {said}", None
        if waits > WAIT_SHARE and rate > 0 and self.workers < room():
            self._before, self.loading = rate, True
            self.workers += 1
            return Decision(self.workers - 1, self.workers, said)
        self.settled = True
        full = ", and there is room for no more" if waits > WAIT_SHARE else ""
        return Decision(self.workers, self.workers, said + full)

    def _remove_worker(self, reason: str) -> Decision:
        self.workers -= 1
        self._before, self.loading = None, False
        return Decision(self.workers + 1, self.workers, reason)

    def _restart(self, skip: int = SKIPPED_UPDATES) -> None:
        self._blocks, self._to_skip = [_Sums()], skip
