"""The lease table under random events: no group trains twice, is lost or is too old."""

import random
from dataclasses import replace

from deliveries import deliver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from grpo_actors.schedule.curriculum import Curriculum
from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult
from grpo_actors.schedule.lease import MAX_LOSSES, Cursor, Granted
from grpo_actors.schedule.leases import GRACE_S, LeaseTable

TIMEOUT_S = 50.0
WORKERS = ("a", "b", "c")
workers = st.sampled_from(WORKERS)


class Run(RuleBasedStateMachine):
    """A run whose workers join, work, fail and die, and whose learner is stopped and resumed."""

    @initialize(
        batch=st.integers(1, 3),
        runs=st.integers(1, 3),
        staleness=st.integers(0, 2),
        long=st.integers(3, 12),
        flaws=st.integers(1, 6),
        limit=st.integers(0, 12),
        spare=st.integers(0, 5),
        skipping=st.integers(0, 1),
    )
    def begin(self, batch: int, runs: int, staleness: int, limit: int, spare: int, **rates: int) -> None:
        self.batch, self.groups, self.staleness, self.limit = batch, batch * runs, staleness, limit
        #: Every `long`-th problem has a prompt that is too long; one group in `flaws` has a flaw.
        self.long, self.flaws, self.skipping = rates["long"], rates["flaws"], rates["skipping"]
        self.ahead = self.groups + (spare if limit else 0)
        #: Whether leases are opened only as far as they are certain to train in time.
        self.exact = self.ahead == self.groups and (staleness > 0 or not limit)
        self.now_s = 0.0
        self.consumed: list[int] = []
        #: Positions passed over, and how many were not posed.
        self.passed_over: list[int] = []
        self.skipped = 0
        self.set_aside: set[int] = set()
        self.checkpoint = (Cursor(), 0, 0, 0, 0)
        self.open_table(Cursor(), 0)

    def open_table(self, cursor: Cursor, version: int) -> None:
        self.table: LeaseTable[tuple[int, int]] = LeaseTable(
            self.groups,
            self.staleness,
            self.batch,
            TIMEOUT_S,
            10**6,
            version,
            cursor,
            self.leaves_out,
            self.skips,
            self.limit,
            self.ahead,
        )
        #: The grants that each worker holds; all grants so far; how often each lease lost its worker.
        self.held: dict[str, dict[int, Granted]] = {name: {} for name in WORKERS}
        self.granted: list[Granted] = []
        self.last_worker: dict[int, str] = {}
        self.accepted: set[int] = set()
        self.losses: dict[int, int] = {}

    def leaves_out(self, position: int) -> bool:
        return position % self.long == 2

    def skips(self, position: int) -> bool:
        """Another answer after each update, as if success rates had changed."""
        return self.skipping > 0 and (3 * position + self.table.version) % 4 == 0

    def filter_result(self, position: int, version: int) -> FilterResult:
        return FilterResult(0.0, "no_signal") if (position + version) % self.flaws == 0 else NOT_FILTERED

    def accept(self, worker: str, grant: Granted, version: int) -> bool:
        result = self.filter_result(grant.lease, version)
        return deliver(self.table, grant, version, (grant.lease, version), result, worker=worker).new

    # --- workers ---

    @rule(worker=workers, capacity=st.integers(0, 12))
    def grant(self, worker: str, capacity: int) -> None:
        run = self.table.grant(worker, capacity, self.now_s)
        positions = [grant.lease for grant in run]
        assert positions == sorted(set(positions))
        assert len({position // self.batch for position in positions}) <= 1
        for grant in run:
            assert grant.lease not in self.accepted
            assert all(grant.lease not in held for held in self.held.values())
            assert grant.attempt > max((g.attempt for g in self.granted if g.lease == grant.lease), default=0)
            self.granted.append(grant)
            self.held[worker][grant.lease] = grant
            self.last_worker[grant.lease] = worker
        assert len(self.held[worker]) <= max(capacity, len(self.held[worker]) - len(run))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([name for name in WORKERS if self.held[name]]))
        grant = data.draw(st.sampled_from(list(self.held[worker].values())))
        version = data.draw(st.integers(grant.min_version, self.table.version + 1))
        del self.held[worker][grant.lease]
        # A worker that waits until it has min_version is never refused for staleness, however late it is.
        # The exception: groups that were opened for refills and came too early.
        version = min(version, self.table.version)
        if version < grant.min_version:
            self.table.hand_back(worker)
            self.held[worker].clear()
            return
        if self.accept(worker, grant, version):
            self.accepted.add(grant.lease)
        else:
            assert not self.exact

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), worker=workers, bits=st.integers(0, 3), later=st.integers(0, 1))
    def forge(self, data: st.DataObject, worker: str, bits: int, later: int) -> None:
        """Send a group for a grant of another worker, or with a token or an attempt that were never granted."""
        grant = data.draw(st.sampled_from(self.granted))
        holds = self.held[worker].get(grant.lease)
        invented = replace(grant, token=grant.token ^ bits, attempt=grant.attempt + later)
        if holds == invented:
            return  # `finish` covers this case
        before = {name: self.table.held_by(name) for name in WORKERS if name != worker}
        if self.accept(worker, invented, self.table.version):
            # A worker that was given up on may still deliver, until its lease is granted again.
            assert invented == grant
            assert self.last_worker[grant.lease] == worker
            self.accepted.add(grant.lease)
        assert before == {name: self.table.held_by(name) for name in before}

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), version=st.integers(0, 3))
    def repeat_anything(self, data: st.DataObject, version: int) -> None:
        grant = data.draw(st.sampled_from(self.granted))
        last = max(g.attempt for g in self.granted if g.lease == grant.lease)
        open_now = grant.lease not in self.accepted | self.set_aside and grant.attempt == last
        if open_now:
            return  # `finish` and `finish_too_old` cover this case
        worker = data.draw(workers)
        verdict = deliver(self.table, grant, version, (grant.lease, -1), worker=worker)
        assert not verdict.new

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def finish_too_old(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([name for name in WORKERS if self.held[name]]))
        grant = data.draw(st.sampled_from(list(self.held[worker].values())))
        slot = next(slot for slot, position, *_ in self.table._slots() if position == grant.lease)
        needed = self.table.version + min(slot // self.groups, self.staleness) - self.staleness
        if needed > 0:
            assert not deliver(self.table, grant, needed - 1, (grant.lease, -1), worker=worker).accepted
            del self.held[worker][grant.lease]  # and it may be granted again

    @rule(worker=workers)
    def die(self, worker: str) -> None:
        held, self.held[worker] = self.held[worker], {}
        self.lose(held, self.table.release(worker))

    @rule(worker=workers)
    def meet_a_poisoned_problem(self, worker: str) -> None:
        for _ in range(MAX_LOSSES):
            self.die(worker)
            self.grant(worker, self.batch)
        self.die(worker)

    @rule(worker=workers)
    def work_undisturbed(self, worker: str) -> None:
        """Work through several leases and an update: random single events seldom get this far."""
        for _ in range(3):
            self.grant(worker, 100)
        for grant in list(self.held[worker].values()):
            if grant.min_version <= self.table.version:
                del self.held[worker][grant.lease]
                if self.accept(worker, grant, grant.min_version):
                    self.accepted.add(grant.lease)
                else:
                    assert not self.exact
        self.train()

    @rule(worker=workers)
    def leave(self, worker: str) -> None:
        self.table.hand_back(worker)
        self.held[worker].clear()

    @rule()
    def time_out(self) -> None:
        self.now_s += TIMEOUT_S
        held = {position for leases in self.held.values() for position in leases}
        for leases in self.held.values():
            leases.clear()
        self.lose(held, self.table.expire(self.now_s))

    @rule(worker=workers, data=st.data())
    def lose_grants_on_the_way(self, worker: str, data: st.DataObject) -> None:
        self.now_s += GRACE_S + 1
        holding = data.draw(st.sets(st.sampled_from(list(self.held[worker]) or [0])))
        self.table.reconcile(worker, holding, self.now_s)
        self.held[worker] = {p: grant for p, grant in self.held[worker].items() if p in holding}

    def lose(self, held: "set[int] | dict[int, Granted]", set_aside: list[int]) -> None:
        for position in held:
            self.losses[position] = self.losses.get(position, 0) + 1
        assert sorted(set_aside) == sorted(p for p in held if self.losses[p] == MAX_LOSSES)
        self.set_aside.update(set_aside)

    # --- learner ---

    @rule()
    def train(self) -> None:
        batch = self.table.next_batch()
        if batch is None:
            return
        assert len(batch) == self.groups
        for position, (lease, version) in batch:
            assert position == lease
            assert 0 <= self.table.version - version <= self.staleness
            self.consumed.append(position)
        self.settle([position for position, _ in batch])

    def settle(self, batch: list[int]) -> None:
        consumption = self.table.consume(batch)
        assert [settled.position for settled in consumption.settled if settled.trained] == batch
        # The first `limit` groups with a flaw are passed over, and no others.
        flawed = [settled for settled in consumption.settled if settled.filter_result.flaw]
        assert [settled.trained for settled in flawed] == [at >= self.limit for at in range(len(flawed))]
        self.passed_over += [settled.position for settled in consumption.settled if not settled.trained]
        self.skipped += consumption.skipped
        if self.exact:
            assert consumption.outdated == 0
        if self.staleness == 0:  # the table is now like a fresh one
            assert self.table._states == {}
            assert self.table._next == self.table.cursor.position
            assert self.table._skipped == []
        # A lease that was taken back may be granted again; no worker holds it.
        states = self.table._states
        settled = {*self.consumed, *batch, *self.passed_over}
        self.accepted = {p for p in self.accepted if p in settled or (p in states and states[p].group)}
        for held in self.held.values():
            for position, grant in list(held.items()):
                if position not in states or states[position].attempt != grant.attempt:
                    del held[position]

    @rule()
    def save(self) -> None:
        counts = (len(self.consumed), len(self.passed_over), self.skipped)
        self.checkpoint = (self.table.cursor, self.table.version, *counts)

    @rule()
    def resume(self) -> None:
        cursor, version, consumed, passed_over, self.skipped = self.checkpoint
        del self.consumed[consumed:], self.passed_over[passed_over:]
        self.set_aside = {p for p in self.set_aside if p < cursor.position} | set(cursor.set_aside)
        self.open_table(cursor, version)

    # --- what must always hold ---

    @invariant()
    def each_position_is_settled_once_or_set_aside_or_left_out_or_skipped(self) -> None:
        if hasattr(self, "table"):
            done = self.table.cursor.position
            assert sorted(self.consumed) == self.consumed
            assert sorted(self.passed_over) == self.passed_over
            posed = [p for p in range(done) if p not in self.set_aside and not self.leaves_out(p)]
            settled = {*self.consumed, *self.passed_over}
            assert len(settled) == len(self.consumed) + len(self.passed_over) == len(posed) - self.skipped
            assert settled <= set(posed)

    @invariant()
    def at_most_s_plus_one_updates_are_open_that_may_train(self) -> None:
        if hasattr(self, "table") and self.exact:
            may_train = sum(not over for *_, over in self.table._slots())
            assert may_train <= (self.staleness + 1) * self.groups

    @invariant()
    def no_group_is_held_that_is_too_old(self) -> None:
        if hasattr(self, "table"):
            held = [state.group for state in self.table._states.values() if state.group is not None]
            assert all(self.table.version - version <= self.staleness for _, version in held)


Run.TestCase.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRun = Run.TestCase


def batches(seed: int, long: frozenset[int], groups: int, batch: int, staleness: int) -> set[frozenset[int]]:
    """Return which leases were sampled together in a run of random timing, stopped and resumed at random."""
    chance = random.Random(seed)
    cursor, version, together = Cursor(), 0, set()
    while version < 4:
        table: LeaseTable[int] = LeaseTable(
            groups, staleness, batch, 1e9, 10**6, version, cursor, long.__contains__
        )
        out: list[Granted] = []
        for _ in range(chance.randrange(10, 40)):
            run = table.grant("w", 10_000, 0.0) if chance.random() < 0.5 else []
            out += run
            together.add(frozenset(grant.lease for grant in run))
            if out and chance.random() < 0.7:
                grant = out.pop(chance.randrange(len(out)))
                deliver(table, grant, table.version, grant.lease)
            done = table.next_batch()
            if done and chance.random() < 0.5:
                table.consume([position for position, _ in done])
        cursor, version = table.cursor, table.version
    return {run for run in together if run and max(run) < 4 * groups}


@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    long=st.frozensets(st.integers(0, 40), max_size=10),
    runs=st.integers(1, 2),
    batch=st.integers(1, 4),
    staleness=st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_which_leases_share_a_batch_depends_neither_on_timing_nor_on_a_resume(
    seeds, long, runs, batch, staleness
):
    first, second = (batches(seed, long, batch * runs, batch, staleness) for seed in seeds)
    assert first == second


def history(seed: int, problems: int, **settings: int) -> list[tuple[object, ...]]:
    """Return what trained, was passed over and was skipped in each update of a run with S = 0 and random timing.

    A group is identified by its position, the version that sampled it and the leases in its batch. All three decide
    whether it has a flaw and what the curriculum learns from it. The run is stopped and resumed at random.
    """
    chance = random.Random(seed)
    cursor, version, updates = Cursor(), 0, []
    rates: dict[str, float] = {}
    while version < 8:
        curriculum = Curriculum(7, 0.3, dict(rates))
        table: LeaseTable[tuple[object, ...]] = LeaseTable(
            max_staleness=0,
            lease_timeout_s=1e9,
            last_version=10**6,
            version=version,
            cursor=cursor,
            leaves_out=lambda position: position % 7 == 3,
            skips=lambda position, known=curriculum: (
                not known.poses(position // problems, str(position % problems))
            ),
            **settings,
        )
        out: list[tuple[Granted, tuple[int, ...], int]] = []
        for _ in range(chance.randrange(10, 80)):
            run = table.grant("w", 10_000, 0.0) if chance.random() < 0.6 else []
            out += [(grant, tuple(g.lease for g in run), table.version) for grant in run]
            if out and chance.random() < 0.8:
                # In time or late, sampled by the policy at the grant or by a newer one.
                grant, together, sampled = out.pop(chance.randrange(len(out)))
                sampled = chance.choice([sampled, table.version])
                group = (grant.lease, sampled, together)
                success = random.Random(str(group)).choice([0.0, 0.5, 1.0])
                filter_result = FilterResult(success, "" if success == 0.5 else "no_signal")
                deliver(table, grant, sampled, group, filter_result)
            done = table.next_batch()
            if done and chance.random() < 0.5:
                consumption = table.consume([position for position, _ in done])
                for settled in consumption.settled:
                    assert settled.filter_result.success is not None
                    curriculum.record(str(settled.position % problems), settled.filter_result.success)
                passed_over = [settled.position for settled in consumption.settled if not settled.trained]
                updates.append((table.version, done, passed_over, consumption.skipped))
                cursor, version, rates = table.cursor, table.version, dict(curriculum.rates)
    return updates[:8]


@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    limit=st.integers(0, 20),
    spare=st.integers(0, 10),
    problems=st.integers(2, 30),
)
@settings(max_examples=150, deadline=None)
def test_on_policy_neither_timing_nor_a_resume_changes_which_groups_train(
    seeds, shape, limit, spare, problems
):
    runs, batch = shape
    groups = runs * batch
    table = {
        "groups_per_update": groups,
        "batch_groups": batch,
        "refill_limit": limit,
        "ahead": groups + (spare if limit else 0),
    }
    first, second = (history(seed, problems, **table) for seed in seeds)
    assert first == second
