"""Leases: who samples what, and which groups make the next update.

A lease is a position in the order of problems. It waits, is out at a worker, or is done; done leases
are consumed in the order of their positions, `groups_per_update` at a time, so the groups of an
update do not depend on which worker was faster (taking the first that arrive would favour short
completions). A lease whose worker dies goes back as it is, with the same seeds.

The staleness bound is hard: a lease is open only while it is among the next (S + 1) × groups_per_update
to be consumed. As consumption is in order, a group that is sampled with version v is consumed while the
policy is at most S updates further. `accept` checks it again.

Time comes in as an argument, in seconds of any monotonic clock. Everything costs at most one pass over
the open leases, and holds no more memory than they do.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

G = TypeVar("G")

#: A lease that lost this many workers is set aside with its problem: it may be what kills them.
MAX_LOSSES = 3
#: How long a grant may take to show up in a worker's list of what it holds.
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Granted:
    """What a worker is told to sample."""

    lease: int
    attempt: int
    min_version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a group that came in; an accepted one with a reason was taken before."""

    accepted: bool
    reason: str = ""

    @property
    def new(self) -> bool:
        """The group is to be kept: it is the first for its lease."""
        return self.accepted and not self.reason


@dataclass(frozen=True, slots=True)
class _Out:
    worker: str
    since_s: float
    deadline_s: float


@dataclass(slots=True)
class _State(Generic[G]):
    attempt: int = 0
    losses: int = 0
    out: _Out | None = None
    group: G | None = None

    @property
    def waiting(self) -> bool:
        return self.out is None and self.group is None

    @property
    def suspect(self) -> bool:
        """One loss is bad luck; after two the lease travels alone, so that no other dies with it."""
        return self.losses == MAX_LOSSES - 1


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a resumed run needs: everything before `position` was consumed, set aside or left out."""

    position: int = 0
    #: Positions at or after `position` that killed their workers, and must not be sampled again.
    set_aside: tuple[int, ...] = ()


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
    cursor: Cursor = Cursor()
    #: Whether the problem at a position can not be sampled at all, always the same. Asked once, before its
    #: neighbours are granted, so that it never changes who shares a batch or an update.
    leaves_out: Callable[[int], bool] = lambda position: False  # noqa: ARG005
    _next: int = field(init=False)
    #: The open leases. Positions only ever grow, so the dict's own order is theirs.
    _states: dict[int, _State[G]] = field(init=False, default_factory=dict)
    _set_aside: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.cursor.position
        self._set_aside = set(self.cursor.set_aside)

    # --- granting ---------------------------------------------------------------------------------

    def grant(self, worker: str, capacity: int, now_s: float) -> list[Granted]:
        """The next leases for a worker that would hold `capacity` at a time; [] if none may go out.

        They are one aligned run of positions, all of one update, to be sampled as one batch: which
        problems share a batch (and so the last bits of their log-probs) depends neither on timing
        nor on a resume, only on losses.
        """
        self._open_window()
        run = list(self._next_run())
        if not run or len(run) > capacity - self.held_by(worker):
            return []
        granted = []
        for place, position in run:
            state = self._states[position]
            state.attempt += 1
            state.out = _Out(worker, now_s, now_s + self.lease_timeout_s)
            granted.append(Granted(position, state.attempt, self._min_version(place)))
        return granted

    def _next_run(self) -> Iterator[tuple[int, int]]:
        """(place among the open leases, position) of the first that wait and belong together."""
        begun: tuple[int, int] | None = None
        for place, (position, state) in enumerate(self._states.items()):
            batch = (position // self.batch_groups, place // self.groups_per_update)
            if begun is not None and (batch != begun or state.suspect):
                return
            if state.waiting:
                yield place, position
                if state.suspect:
                    return
                begun = batch

    def _open_window(self) -> None:
        updates = min(self.max_staleness + 1, self.last_version - self.version)
        while len(self._states) < updates * self.groups_per_update:
            if self._next not in self._set_aside and not self.leaves_out(self._next):
                self._states[self._next] = _State()
            self._next += 1

    def _min_version(self, place: int) -> int:
        """The oldest policy that may sample the open lease at `place`: it trains once all before it have."""
        return max(0, self.version + place // self.groups_per_update - self.max_staleness)

    # --- what comes back --------------------------------------------------------------------------

    def judge(self, lease: int, attempt: int, oldest_version: int) -> Verdict:
        """What `accept` would say; changes nothing."""
        state = self._states.get(lease)
        if state is None:
            settled = lease < self.cursor.position
            return Verdict(settled, "settled before" if settled else f"lease {lease} is not open")
        if state.attempt == 0:
            return Verdict(accepted=False, reason=f"lease {lease} was not granted yet")
        if attempt != state.attempt:
            reason = f"attempt {attempt} of lease {lease} was given up; {state.attempt} is the last"
            return Verdict(accepted=False, reason=reason)
        if state.group is not None:
            return Verdict(accepted=True, reason="had it")
        needed = self._min_version(sum(1 for position in self._states if position < lease))
        if oldest_version < needed:
            reason = f"lease {lease} was sampled with version {oldest_version}, needs {needed}"
            return Verdict(accepted=False, reason=reason)
        return Verdict(accepted=True)

    def accept(self, lease: int, attempt: int, oldest_version: int, group: G) -> Verdict:
        """Take a group that a worker sent, or say why not. A repeat of an accepted one is accepted."""
        verdict = self.judge(lease, attempt, oldest_version)
        if verdict.new:
            state = self._states[lease]
            state.out, state.group = None, group
        elif not verdict.accepted:
            self.refuse(lease, attempt)
        return verdict

    def refuse(self, lease: int, attempt: int) -> None:
        """This attempt's result is of no use: the lease waits again, and nothing is held against it."""
        state = self._states.get(lease)
        if state is not None and state.attempt == attempt:
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

    def _give_up(self, lost: Callable[[_Out], bool]) -> list[int]:
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
        """The groups of the next update, in order; None until all of them are there."""
        batch: list[tuple[int, G]] = []
        for position, state in islice(self._states.items(), self.groups_per_update):
            if state.group is None:
                return None
            batch.append((position, state.group))
        return batch if len(batch) == self.groups_per_update else None

    def consume(self, batch: Iterable[int]) -> None:
        """The batch that `next_batch` gave has gone into an update, whose result is the next version."""
        for position in batch:
            del self._states[position]
        self.version += 1
        start = next(iter(self._states), self._next)
        self._set_aside = {position for position in self._set_aside if position >= start}
        self.cursor = Cursor(start, tuple(sorted(self._set_aside)))

    def held_by(self, worker: str) -> int:
        """Leases that are out at a worker."""
        return sum(1 for state in self._states.values() if state.out and state.out.worker == worker)
