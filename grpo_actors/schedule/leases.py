"""Leases: who samples what, and which groups make the next update.

A lease is a position in the order of problems. It waits, is out at a worker, or is done; done leases
are consumed in the order of their positions, `groups_per_update` at a time, so the groups of an
update do not depend on which worker was faster (taking the first that arrive would favour short
completions). A lease whose worker dies goes back as it is, with the same seeds.

A group with a flaw is passed over, and the next position takes its place: `refill_limit` times an update
at most, after which groups count as they are. The last ones count, not the first: then a group that
is passed over never comes back into an update that has grown behind it.

The staleness bound is hard: no group is held that is older than S versions. `judge` refuses it, and
`consume` takes back what has become so, with a flaw or without. Next to nothing is taken back, because a lease
is granted to a policy young enough for its place: the open leases before it that may still train. A group passed
over only lowers the places behind it, and an update lowers them by groups_per_update while the version rises by
one. Only leases beyond (S + 1) × groups_per_update places may be in vain: those opened ahead of refills.

With S = 0 an update is a function of the cursor, however often the run is resumed: after `consume` no group is
held and no lease open, as in a fresh table, and positions are decided anew. Within an update version and `skips`
stand still, runs are opened whole and sampled whole, and which groups it takes follows from those at the
positions before them; leases opened beyond them change nothing. (A lost worker changes who shares a batch.)

Time comes in as an argument, in seconds of any monotonic clock. Everything costs a few passes over
the open leases, and holds no more memory than they do.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult
from grpo_actors.schedule.lease import (
    MAX_LOSSES,
    START,
    Consumption,
    Cursor,
    Granted,
    Out,
    Settled,
    State,
    Verdict,
)

G = TypeVar("G")

#: How long a grant may take to show up in a worker's list of what it holds.
GRACE_S = 5.0


@dataclass
class LeaseTable(Generic[G]):
    """The ledger of one run. Events in, decisions out."""

    groups_per_update: int
    max_staleness: int
    #: Leases granted together, as one batch; divides groups_per_update.
    batch_groups: int
    lease_timeout_s: float
    #: The version that ends the run: no lease is granted that would only be trained after it.
    last_version: int
    version: int = 0
    cursor: Cursor = START
    #: Whether the problem at a position can not be sampled at all, always the same. Asked before its
    #: neighbours are granted, so that it never changes who shares a batch or an update.
    leaves_out: Callable[[int], bool] = lambda position: False  # noqa: ARG005
    #: Whether the problem at a position is not posed as things stand; they may change with each `consume`.
    skips: Callable[[int], bool] = lambda position: False  # noqa: ARG005
    #: Groups that one update may pass over; 0: flawed ones train like all others.
    refill_limit: int = 0
    #: Groups opened for each update, at least groups_per_update: refills are sampled before they are needed.
    ahead: int = 0
    _next: int = field(init=False)
    #: The open leases. Positions only ever grow, so the dict's own order is theirs.
    _states: dict[int, State[G]] = field(init=False, default_factory=dict)
    #: Closed until their turn comes again: what was tried and lost still counts.
    _closed: dict[int, State[G]] = field(init=False, default_factory=dict)
    _set_aside: set[int] = field(init=False)
    _skipped: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._next = self.cursor.position
        self._set_aside = set(self.cursor.set_aside)
        self.ahead = max(self.ahead, self.groups_per_update)

    @property
    def _whole_runs(self) -> bool:
        """Whether a run is sampled whole even if not all of it is needed; else it ends where its update does.

        With refills the ends of updates move as groups come in; with S = 0 nothing may depend on when they do.
        """
        return self.refill_limit > 0 and self.max_staleness == 0

    def _places(self) -> Iterator[tuple[int, int, State[G], bool]]:
        """(place, position, state, whether it is passed over) of each open lease."""
        place = passed_over = 0
        for position, state in self._states.items():
            over = bool(state.filter_result.flaw) and passed_over < self.refill_limit
            yield place, position, state, over
            passed_over += over
            place += not over
            if not over and place % self.groups_per_update == 0:
                passed_over = 0  # the next update's

    # --- granting ---------------------------------------------------------------------------------

    def grant(self, worker: str, capacity: int, now_s: float) -> list[Granted]:
        """The next leases for a worker that would hold `capacity` at a time; [] if none may go out.

        They are one aligned run of positions, all of one update, to be sampled as one batch: which
        problems share a batch (and so the last bits of their log-probs) depends neither on timing
        nor on a resume, only on losses; with refills, this holds for S = 0.
        """
        self._open_window()
        run = list(self._next_run())
        if not run or len(run) > capacity - self.held_by(worker):
            return []
        if run[0][0] // self.groups_per_update > self.max_staleness and self.next_batch() is not None:
            return []  # the batch is whole, and what this policy samples now would be too old for those to come
        granted = []
        for place, position in run:
            state = self._states[position]
            state.attempt += 1
            state.out = Out(worker, now_s, now_s + self.lease_timeout_s)
            state.oldest_version = self._min_version(place)
            granted.append(Granted(position, state.attempt, state.oldest_version))
        return granted

    def _next_run(self) -> Iterator[tuple[int, int]]:
        """(place among the open leases, position) of the first that wait and belong together."""
        begun: tuple[int, int] | None = None
        for place, position, state, _ in self._places():
            update = 0 if self._whole_runs else place // self.groups_per_update
            batch = (position // self.batch_groups, update)
            if begun is not None and (batch != begun or state.suspect):
                return
            if state.waiting:
                yield place, position
                if state.suspect:
                    return
                begun = batch

    def _open_window(self) -> None:
        updates = min(self.max_staleness + 1, self.last_version - self.version)
        missing = updates * self.ahead - sum(not over for *_, over in self._places())
        if missing <= 0:
            return
        while missing > 0 or (self._whole_runs and self._next % self.batch_groups):
            missing -= self._open(self._next)
            self._next += 1

    def _open(self, position: int) -> bool:
        """Whether the next position becomes a lease."""
        if position in self._set_aside or self.leaves_out(position):
            return False
        if self.skips(position):
            self._skipped.append(position)
            return False
        self._states[position] = self._closed.pop(position, State())
        return True

    def _min_version(self, place: int) -> int:
        """The oldest policy that may sample the open lease at `place`: it trains once all before it have, or sooner."""
        later = min(place // self.groups_per_update, self.max_staleness)
        return max(0, self.version + later - self.max_staleness)

    # --- what comes back --------------------------------------------------------------------------

    def judge(self, lease: int, attempt: int, oldest_version: int) -> Verdict:
        """Whether a group is taken; changes nothing. `accept` follows if the verdict is `new`, `refuse` if it is no."""
        return Verdict(lease, attempt, oldest_version, *self._judge(lease, attempt, oldest_version))

    def _judge(self, lease: int, attempt: int, oldest_version: int) -> tuple[bool, str]:
        state = self._states.get(lease)
        if state is None:
            settled = lease < self.cursor.position
            return settled, "settled before" if settled else f"lease {lease} is not open"
        if state.attempt == 0:
            return False, f"lease {lease} was not granted yet"
        if attempt != state.attempt:
            return False, f"attempt {attempt} of lease {lease} was given up; {state.attempt} is the last"
        if state.group is not None:
            return True, "had it"
        needed = self._min_version(next(place for place, position, *_ in self._places() if position == lease))
        if oldest_version < needed:
            return False, f"lease {lease} was sampled with version {oldest_version}, needs {needed}"
        return True, ""

    def accept(self, verdict: Verdict, group: G, filter_result: FilterResult = NOT_FILTERED) -> None:
        """Take the group of a verdict that is `new`; nothing happens in between."""
        assert verdict.new, verdict
        state = self._states[verdict.lease]
        assert (state.attempt, state.group) == (verdict.attempt, None), (
            "the table has changed since the verdict"
        )
        state.out, state.group, state.filter_result = None, group, filter_result
        state.oldest_version = verdict.oldest_version

    def refuse(self, lease: int, attempt: int) -> None:
        """This attempt's result is of no use: the lease waits again, and nothing is held against it."""
        state = self._states.get(lease)
        if state is not None and state.attempt == attempt:
            assert state.group is None, f"the group of lease {lease} was accepted"
            state.out = None

    def release(self, worker: str) -> list[int]:
        """A worker died: its leases go back. Returns those that are set aside for good."""
        return self._give_up(lambda out: out.worker == worker)

    def expire(self, now_s: float) -> list[int]:
        """Leases past their deadline go back. Returns those that are set aside for good."""
        return self._give_up(lambda out: out.deadline_s <= now_s)

    def hand_back(self, worker: str) -> None:
        """A worker leaves politely: its leases go back, and nothing is held against them."""
        for state in self._states.values():
            if state.out and state.out.worker == worker:
                state.out = None

    def reconcile(self, worker: str, holding: Collection[int], now_s: float) -> None:
        """A worker says what it holds: a lease it was granted but does not know goes back."""
        held = frozenset(holding)
        for position, state in self._states.items():
            # A grant, or the list itself, may still be on its way.
            if (
                state.out
                and state.out.worker == worker
                and position not in held
                and now_s - state.out.since_s > GRACE_S
            ):
                state.out = None

    def _give_up(self, lost: Callable[[Out], bool]) -> list[int]:
        poisoned = []
        for position, state in self._states.items():
            if state.out and lost(state.out):
                state.out = None
                state.losses += 1
                if state.losses >= MAX_LOSSES:
                    poisoned.append(position)
        for position in poisoned:
            del self._states[position]
        self._set_aside.update(poisoned)
        return poisoned

    # --- consumption ------------------------------------------------------------------------------

    def next_batch(self) -> list[tuple[int, G]] | None:
        """The groups of the next update, in order; None until all of them, and those before them, are there."""
        batch: list[tuple[int, G]] = []
        for _, position, state, over in self._places():
            if state.group is None:
                return None
            if not over:
                batch.append((position, state.group))
            if len(batch) == self.groups_per_update:
                return batch
        return None

    def consume(self, batch: Iterable[int]) -> Consumption:
        """The batch that `next_batch` gave has gone into an update, whose result is the next version."""
        trained = frozenset(batch)
        last = max(trained)
        settled = [
            Settled(position, self._states.pop(position).filter_result, position in trained)
            for position in [position for position in self._states if position <= last]
        ]
        self.version += 1
        outdated = self._take_back_outdated()
        if self.refill_limit:
            self._close_unsampled(last)
        start = next(iter(self._states), self._next)
        skipped = sum(position < start for position in self._skipped)
        del self._skipped[:skipped]
        self._closed = {position: state for position, state in self._closed.items() if position >= start}
        self._set_aside = {position for position in self._set_aside if position >= start}
        self.cursor = Cursor(start, tuple(sorted(self._set_aside)))
        return Consumption(settled, skipped, outdated)

    def _take_back_outdated(self) -> int:
        """Groups, had or expected, of policies that may not train any more; returns how many."""
        oldest = self.version - self.max_staleness
        outdated = [s for s in self._states.values() if not s.waiting and s.oldest_version < oldest]
        for state in outdated:
            state.take_back()
        return len(outdated)

    def _close_unsampled(self, last: int) -> None:
        """Close the leases behind all that is out or done, up to `last`: they are decided anew when opened."""
        for position in reversed(list(self._states)):
            if not self._states[position].waiting:
                break
            self._closed[position] = self._states.pop(position)
        self._next = next(reversed(self._states), last) + 1
        self._skipped = [position for position in self._skipped if position < self._next]

    def held_by(self, worker: str) -> int:
        """Leases that are out at a worker."""
        return sum(1 for state in self._states.values() if state.out and state.out.worker == worker)
