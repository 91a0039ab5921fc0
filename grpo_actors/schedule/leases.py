"""The lease table: decides which worker samples which problem, and which groups form the next update.

**Lease.** A lease is a position in the order of problems. It waits, is out at a worker, or is done. Done leases
are consumed in the order of their positions, `groups_per_update` at a time. So the groups of an update do not
depend on which worker was faster; taking the first that arrive would favour short completions.

**Staleness.** The bound is hard: the table holds no group that is more than S versions old. `judge` refuses such
a group, and `consume` takes back a group that has become too old, with or without a flaw. The *slot* of a lease is
the number of open leases before it that may still train. It gives the oldest policy that may sample the lease::

    groups_per_update = 2, S = 1, version = 5
    slots 0, 1: train at version 5, so version 4 may sample them
    slots 2, 3: train at version 6, so it takes version 5

Few groups become too old, because slots only go down: a group that is passed over lowers the slots behind it, and
an update lowers them by `groups_per_update` while the version rises by one. Only leases at slots from
(S + 1) × `groups_per_update` on may be wasted: those opened ahead of refills.

**Refills.** A group with a flaw is passed over, and the next position takes its slot. An update passes over at most
`refill_limit` groups; later ones train with their flaws. The last ones train and not the first, so that a group once
passed over never returns to an update that has grown behind it::

    groups_per_update = 2, refill_limit = 1; 0 and 1 have a flaw
    0 is passed over; 1 and 2 train, because the limit is reached

**Resume.** With S = 0 an update is a function of the cursor, however often the run is resumed. After `consume` no
group is held and no lease is open, as in a fresh table, and positions are decided anew. During one update the version
and `skips` do not change, runs of positions are opened and sampled whole, and the groups taken depend only on the
groups at earlier positions; leases opened beyond them change nothing. (A lost worker does change which problems
share a batch.)

Time is an argument, in seconds of any monotonic clock. Each operation costs a few passes over the open leases, and
the table needs no more memory than they do.
"""

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult
from grpo_actors.schedule.lease import (
    MAX_LOSSES,
    START,
    Claim,
    Consumption,
    Cursor,
    Granted,
    Out,
    Settled,
    State,
    Verdict,
)

G = TypeVar("G")

#: Seconds that a grant may take to appear in its worker's list of held leases.
GRACE_S = 5.0
#: Bits of a fencing token.
TOKEN_BITS = 64


@dataclass
class LeaseTable(Generic[G]):
    """The lease table of one run: events go in, decisions come out."""

    groups_per_update: int
    max_staleness: int
    #: Leases granted together and sampled as one batch; divides groups_per_update.
    batch_groups: int
    lease_timeout_s: float
    #: The version that ends the run: no lease is granted that would train only after it.
    last_version: int
    version: int = 0
    cursor: Cursor = START
    #: Whether the problem at a position cannot be sampled at all; the answer never changes. Called before the
    #: neighbours of the position are granted, so that it never changes which leases share a batch or an update.
    leaves_out: Callable[[int], bool] = lambda position: False  # noqa: ARG005
    #: Whether the problem at a position is not posed at present; the answer may change with each `consume`.
    skips: Callable[[int], bool] = lambda position: False  # noqa: ARG005
    #: Groups that one update may pass over; 0: flawed groups train like all others.
    refill_limit: int = 0
    #: Groups opened for each update, at least groups_per_update: refills are sampled before they are needed.
    ahead: int = 0
    _next: int = field(init=False)
    #: The open leases by position. Positions only grow, so the dict is in their order.
    _states: dict[int, State[G]] = field(init=False, default_factory=dict)
    #: Leases closed until their turn comes again. Their attempts and losses still count.
    _closed: dict[int, State[G]] = field(init=False, default_factory=dict)
    _set_aside: set[int] = field(init=False)
    _skipped: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._next = self.cursor.position
        self._set_aside = set(self.cursor.set_aside)
        self.ahead = max(self.ahead, self.groups_per_update)

    @property
    def _whole_runs(self) -> bool:
        """Return whether a run is sampled whole even if not all of it is needed; otherwise it ends with its update."""
        # With refills the end of an update moves as groups come in; with S = 0 nothing may depend on their timing.
        return self.refill_limit > 0 and self.max_staleness == 0

    def _slots(self) -> Iterator[tuple[int, int, State[G], bool]]:
        """Yield (slot, position, state, whether it is passed over) of each open lease."""
        slot = passed_over = 0
        for position, state in self._states.items():
            over = bool(state.filter_result.flaw) and passed_over < self.refill_limit
            yield slot, position, state, over
            passed_over += over
            slot += not over
            if not over and slot % self.groups_per_update == 0:
                passed_over = 0  # the next update has its own limit

    def grant(self, worker: str, capacity: int, now_s: float) -> list[Granted]:
        """Grant the next leases to a worker that holds at most `capacity` at a time; [] if none may go out.

        They are one aligned run of positions, all of one update, to be sampled as one batch. So which problems
        share a batch (and with it the last bits of their log-probs) depends neither on timing nor on a resume,
        only on lost workers. With refills, this holds for S = 0 only.
        """
        self._open_window()
        run = list(self._next_run())
        if not run or len(run) > capacity - self.held_by(worker):
            return []
        if run[0][0] // self.groups_per_update > self.max_staleness and self.next_batch() is not None:
            return []  # the batch is complete; a group of this policy would be too old for the updates after it
        granted = []
        for slot, position in run:
            state = self._states[position]
            state.attempt += 1
            state.worker, state.token = worker, secrets.randbits(TOKEN_BITS)
            state.out = Out(now_s, now_s + self.lease_timeout_s)
            state.oldest_version = self._min_version(slot)
            granted.append(Granted(position, state.attempt, state.oldest_version, state.token))
        return granted

    def _next_run(self) -> Iterator[tuple[int, int]]:
        """Yield (slot, position) of the first waiting leases that belong together."""
        begun: tuple[int, int] | None = None
        for slot, position, state, _ in self._slots():
            update = 0 if self._whole_runs else slot // self.groups_per_update
            batch = (position // self.batch_groups, update)
            if begun is not None and (batch != begun or state.suspect):
                return
            if state.waiting:
                yield slot, position
                if state.suspect:
                    return
                begun = batch

    def _open_window(self) -> None:
        updates = min(self.max_staleness + 1, self.last_version - self.version)
        missing = updates * self.ahead - sum(not over for *_, over in self._slots())
        if missing <= 0:
            return
        while missing > 0 or (self._whole_runs and self._next % self.batch_groups):
            missing -= self._open(self._next)
            self._next += 1

    def _open(self, position: int) -> bool:
        """Open the next position as a lease; return False if it is set aside, left out or skipped."""
        if position in self._set_aside or self.leaves_out(position):
            return False
        if self.skips(position):
            self._skipped.append(position)
            return False
        self._states[position] = self._closed.pop(position, State())
        return True

    def _min_version(self, slot: int) -> int:
        """Return the oldest policy that may sample the lease at `slot`, which trains after `later` updates at most."""
        later = min(slot // self.groups_per_update, self.max_staleness)
        return max(0, self.version + later - self.max_staleness)

    def judge(self, claim: Claim) -> Verdict:
        """Decide on a group, without a change. Call `accept` if the verdict is `new`, `refuse` if not `accepted`."""
        lease, state = claim.lease, self._states.get(claim.lease)
        if state is None:
            settled = lease < self.cursor.position
            return Verdict(claim, settled, "settled before" if settled else f"lease {lease} is not open")
        if claim.attempt < state.attempt:
            reason = f"attempt {claim.attempt} of lease {lease} was given up; {state.attempt} is the last"
            return Verdict(claim, accepted=False, reason=reason)
        if not state.was_granted(claim):
            reason = f"attempt {claim.attempt} of lease {lease} was not granted to the sender"
            return Verdict(claim, accepted=False, reason=reason, forged=True)
        return Verdict(claim, *self._judge_holder(claim, state))

    def _judge_holder(self, claim: Claim, state: State[G]) -> tuple[bool, str]:
        """Return whether the group of the last grant is accepted, and the reason."""
        lease = claim.lease
        if claim.worker != state.worker:
            return False, f"lease {lease} is not held by the sender"
        if state.group is not None:
            return True, "had it"
        needed = self._min_version(next(slot for slot, position, *_ in self._slots() if position == lease))
        if claim.oldest_version < needed:
            return False, f"lease {lease} was sampled with version {claim.oldest_version}, needs {needed}"
        return True, ""

    def accept(self, verdict: Verdict, group: G, filter_result: FilterResult = NOT_FILTERED) -> None:
        """Take the group of a verdict that is `new`. The table must not have changed since the verdict."""
        assert verdict.new, verdict
        claim = verdict.claim
        state = self._states[claim.lease]
        assert state.was_granted(claim), "the table has changed since the verdict"
        assert (state.worker, state.group) == (claim.worker, None), "the table has changed since the verdict"
        state.out, state.group, state.filter_result = None, group, filter_result
        state.oldest_version = claim.oldest_version

    def refuse(self, claim: Claim, *, faulty: bool = False) -> list[int]:
        """Discard the group of a claim: its lease waits again.

        Nothing changes if the sender does not hold the lease by this grant: a refusal never costs another worker its lease.

        Args:
            claim: That of a verdict.
            faulty: Whether the contents were wrong. That counts as a loss, as the seeds of a lease never change and the
                next worker may send the same. But it counts once for each worker: one that is always wrong would have
                every problem set aside that it gets.

        Returns:
            The lease, if it is now set aside for good.
        """
        state = self._states.get(claim.lease)
        if state is None or not state.was_granted(claim) or state.worker != claim.worker:
            return []
        assert state.group is None, f"the group of lease {claim.lease} was accepted"
        state.give_back()
        if not faulty or claim.worker in state.faulted:
            return []
        state.faulted.add(claim.worker)
        return self._count_losses([claim.lease])

    def withdraw(self, granted: Iterable[Granted]) -> None:
        """Take back grants that were never sent; this does not count as a loss."""
        for grant in granted:
            self._states[grant.lease].give_back()

    def release(self, worker: str) -> list[int]:
        """Take back a dead worker's leases, counting a loss for each; return those now set aside for good."""
        return self._give_up(lambda state: state.is_out_at(worker))

    def expire(self, now_s: float) -> list[int]:
        """Take back leases past their deadline, counting a loss for each; return those now set aside for good."""
        return self._give_up(lambda state: state.out is not None and state.out.deadline_s <= now_s)

    def hand_back(self, worker: str) -> None:
        """Take back the leases of a worker that leaves properly; this does not count as a loss."""
        for state in self._states.values():
            if state.is_out_at(worker):
                state.give_back()

    def distrust(self, worker: str) -> None:
        """Take back all leases of a worker and discard its groups that have not trained; this does not count as a loss."""
        for state in [*self._states.values(), *self._closed.values()]:
            if state.worker == worker:
                state.take_back()

    def reconcile(self, worker: str, holding: Collection[int], now_s: float) -> None:
        """Take back leases that were granted to a worker but are missing from its list of held leases."""
        held = frozenset(holding)
        for position, state in self._states.items():
            # The grant, or the list itself, may still be on its way: wait for GRACE_S.
            if (
                state.out
                and state.worker == worker
                and position not in held
                and now_s - state.out.since_s > GRACE_S
            ):
                state.give_back()

    def _give_up(self, lost: Callable[[State[G]], bool]) -> list[int]:
        given_up = [position for position, state in self._states.items() if lost(state)]
        for position in given_up:
            # Still the last grant: a late group of this worker is taken until the lease is granted again.
            self._states[position].out = None
        return self._count_losses(given_up)

    def _count_losses(self, positions: Iterable[int]) -> list[int]:
        """Count a loss for each of these leases; return those now set aside for good."""
        poisoned = []
        for position in positions:
            state = self._states[position]
            state.losses += 1
            if state.losses >= MAX_LOSSES:
                poisoned.append(position)
                del self._states[position]
        self._set_aside.update(poisoned)
        return poisoned

    def next_batch(self) -> list[tuple[int, G]] | None:
        """Return the groups of the next update in order; None until they and all groups before them are there."""
        batch: list[tuple[int, G]] = []
        for _, position, state, over in self._slots():
            if state.group is None:
                return None
            if not over:
                batch.append((position, state.group))
            if len(batch) == self.groups_per_update:
                return batch
        return None

    def consume(self, batch: Iterable[int]) -> Consumption:
        """Record that the batch of `next_batch` went into an update, and advance to the version it produced."""
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
        """Take back groups, present or expected, of policies that are too old to train; return how many."""
        oldest = self.version - self.max_staleness
        outdated = [s for s in self._states.values() if not s.waiting and s.oldest_version < oldest]
        for state in outdated:
            state.take_back()
        return len(outdated)

    def _close_unsampled(self, last: int) -> None:
        """Close the waiting leases after the last one that is out or done: they are decided anew when reopened."""
        for position in reversed(list(self._states)):
            if not self._states[position].waiting:
                break
            self._closed[position] = self._states.pop(position)
        self._next = next(reversed(self._states), last) + 1
        self._skipped = [position for position in self._skipped if position < self._next]

    def held_by(self, worker: str) -> int:
        """Return the number of leases that are out at a worker."""
        return sum(state.is_out_at(worker) for state in self._states.values())

    def holdings(self) -> Counter[str]:
        """Return worker -> number of leases that are out at it."""
        return Counter(state.worker for state in self._states.values() if state.out)

    def has_waiting(self) -> bool:
        """Return whether any lease may go out to a worker with room for it."""
        self._open_window()
        return any(state.waiting for state in self._states.values())

    def worker_of(self, lease: int) -> str:
        """Return the worker of the last grant of an open lease; "" if it gave the lease back."""
        return self._states[lease].worker
