"""Leases: who samples what, and which groups make the next update.

A lease is a position in the order of problems. It waits, is out at a worker, or is done; done leases
are consumed in the order of their positions, `groups_per_update` at a time, so the groups of an
update do not depend on which worker was faster (taking the first that arrive would favour short
completions). A lease whose worker dies goes back as it is, with the same seeds.

The staleness bound is hard: a grant is made only while fewer than (S + 1) × groups_per_update leases
are waiting for the learner (out or done). As consumption is in order, a group that is sampled with
version v is consumed while the policy is at most S updates further. `accept` checks it again.

Time comes in as an argument, in seconds of any monotonic clock.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
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
    accepted: bool
    reason: str = ""


@dataclass(slots=True)
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


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a resumed run needs: everything before `position` was consumed or set aside."""

    position: int = 0
    #: Positions at or after `position` that must not be sampled again.
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
    _next: int = field(init=False)
    _states: dict[int, _State[G]] = field(init=False, default_factory=dict)
    _set_aside: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.cursor.position
        self._set_aside = set(self.cursor.set_aside)

    # --- granting ---------------------------------------------------------------------------------

    def grant(self, worker: str, capacity: int, now_s: float) -> list[Granted]:
        """The next leases for a worker that would hold `capacity` at a time; [] if none may go out.

        They are one aligned run of positions, to be sampled as one batch: which problems share a
        batch (and so the last bits of their log-probs) never depends on timing. A lease that has
        lost a worker before travels alone, so that the others do not die with it.
        """
        self._open_window()
        waiting = sorted(position for position, state in self._states.items() if not state.out and state.group is None)
        if not waiting:
            return []
        first = waiting[0]
        if self._states[first].losses > 1:
            run = [first]
        else:
            run = [
                p
                for p in waiting
                if p // self.batch_groups == first // self.batch_groups and self._states[p].losses <= 1
            ]
        if len(run) > capacity - self.held_by(worker):
            return []
        granted = []
        for position in run:
            state = self._states[position]
            state.attempt += 1
            state.out = _Out(worker, now_s, now_s + self.lease_timeout_s)
            granted.append(Granted(position, state.attempt, self._min_version(position)))
        return granted

    def _open_window(self) -> None:
        updates = min(self.max_staleness + 1, self.last_version - self.version)
        while len(self._states) < updates * self.groups_per_update:
            if self._next not in self._set_aside:
                self._states[self._next] = _State()
            self._next += 1

    def _min_version(self, position: int) -> int:
        """The oldest policy this lease may be sampled with: it trains once all before it have."""
        before = sum(1 for p in self._states if p < position)
        return max(0, self.version + before // self.groups_per_update - self.max_staleness)

    # --- what comes back --------------------------------------------------------------------------

    def accept(self, lease: int, attempt: int, oldest_version: int, group: G) -> Verdict:
        """Take a group that a worker sent, or say why not. A repeat of an accepted one is accepted."""
        state = self._states.get(lease)
        if state is None:
            consumed = lease < self.cursor.position and lease not in self._set_aside
            return Verdict(consumed, "consumed before" if consumed else f"lease {lease} is not out")
        if attempt != state.attempt:
            return Verdict(accepted=False, reason=f"attempt {attempt} of lease {lease} was given up; {state.attempt} is the last")
        if state.group is not None:
            return Verdict(accepted=True, reason="had it")
        if oldest_version < self._min_version(lease):
            return Verdict(
                accepted=False,
                reason=f"lease {lease} was sampled with version {oldest_version}, needs {self._min_version(lease)}",
            )
        state.out, state.group = None, group
        return Verdict(accepted=True)

    def release(self, worker: str) -> list[int]:
        """A worker is gone: its leases go back. Returns those that are set aside for good."""
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
        for position, state in self._states.items():
            if state.out and state.out.worker == worker and position not in holding:
                # A grant, or the list itself, may still be on its way.
                if now_s - state.out.since_s > GRACE_S:
                    state.out = None

    def _give_up(self, lost: Callable[[_Out], bool]) -> list[int]:
        poisoned = []
        for position, state in list(self._states.items()):
            if state.out and lost(state.out):
                state.out = None
                state.losses += 1
                if state.losses >= MAX_LOSSES:
                    poisoned.append(position)
        self.drop(poisoned)
        return poisoned

    def drop(self, positions: Iterable[int]) -> None:
        """Set leases aside: they are never sampled again, and the update takes the next ones."""
        for position in positions:
            self._states.pop(position, None)
            self._set_aside.add(position)

    # --- consumption ------------------------------------------------------------------------------

    def next_batch(self) -> list[tuple[int, G]] | None:
        """The groups of the next update, in order; None until all of them are there."""
        self._open_window()
        batch: list[tuple[int, G]] = []
        for position in sorted(self._states)[: self.groups_per_update]:
            group = self._states[position].group
            if group is None:
                return None
            batch.append((position, group))
        return batch if len(batch) == self.groups_per_update else None

    def consume(self, batch: Iterable[int]) -> None:
        """The batch has gone into an update, whose result is the next version."""
        for position in batch:
            del self._states[position]
        self.version += 1
        start = min(self._states, default=self._next)
        self.cursor = Cursor(start, tuple(sorted(p for p in self._set_aside if p >= start)))

    @property
    def granted_below(self) -> int:
        """Every lease that was ever granted is below this position."""
        return self._next

    def held_by(self, worker: str) -> int:
        """Leases that are out at a worker."""
        return sum(1 for state in self._states.values() if state.out and state.out.worker == worker)

    @property
    def ready(self) -> int:
        """Groups that wait for the learner."""
        return sum(1 for state in self._states.values() if state.group is not None)
