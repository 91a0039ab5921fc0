"""Leases under random events: nothing trains twice, nothing is lost, nothing is too old."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from grpo_actors.schedule.lease import MAX_LOSSES, Cursor, Granted
from grpo_actors.schedule.leases import GRACE_S, LeaseTable

TIMEOUT_S = 50.0
WORKERS = ("a", "b", "c")
workers = st.sampled_from(WORKERS)


class Run(RuleBasedStateMachine):
    """A run whose workers come, work, err and die, and whose learner is stopped and resumed."""

    @initialize(
        batch=st.integers(1, 3), runs=st.integers(1, 3), staleness=st.integers(0, 2), long=st.integers(3, 12)
    )
    def begin(self, batch: int, runs: int, staleness: int, long: int) -> None:
        self.batch, self.groups, self.staleness = batch, batch * runs, staleness
        #: Every `long`-th problem has too long a prompt.
        self.long = long
        self.now_s = 0.0
        self.consumed: list[int] = []
        self.set_aside: set[int] = set()
        self.checkpoint = (Cursor(), 0, 0)
        self.open_table(Cursor(), 0)

    def open_table(self, cursor: Cursor, version: int) -> None:
        self.table: LeaseTable[tuple[int, int]] = LeaseTable(
            self.groups, self.staleness, self.batch, TIMEOUT_S, 10**6, version, cursor, self.leaves_out
        )
        #: Who holds which grant; what was ever granted; how often a lease lost its worker.
        self.held: dict[str, dict[int, Granted]] = {name: {} for name in WORKERS}
        self.granted: list[Granted] = []
        self.accepted: set[int] = set()
        self.losses: dict[int, int] = {}

    def leaves_out(self, position: int) -> bool:
        return position % self.long == 2

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
            assert grant.attempt == 1 + max(
                (g.attempt for g in self.granted if g.lease == grant.lease), default=0
            )
            self.granted.append(grant)
            self.held[worker][grant.lease] = grant
        assert len(self.held[worker]) <= max(capacity, len(self.held[worker]) - len(run))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([name for name in WORKERS if self.held[name]]))
        grant = data.draw(st.sampled_from(list(self.held[worker].values())))
        version = data.draw(st.integers(grant.min_version, self.table.version + 1))
        del self.held[worker][grant.lease]
        # A worker that waits until it has min_version is never refused for staleness, however late.
        version = min(version, self.table.version)
        if version < grant.min_version:
            self.table.hand_back(worker)
            self.held[worker].clear()
            return
        assert self.table.accept(grant.lease, grant.attempt, version, (grant.lease, version)).new
        self.accepted.add(grant.lease)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), version=st.integers(0, 3))
    def repeat_anything(self, data: st.DataObject, version: int) -> None:
        grant = data.draw(st.sampled_from(self.granted))
        last = max(g.attempt for g in self.granted if g.lease == grant.lease)
        open_now = grant.lease not in self.accepted | self.set_aside and grant.attempt == last
        if open_now:
            return  # `finish` and `finish_too_old` do that
        verdict = self.table.accept(grant.lease, grant.attempt, version, (grant.lease, -1))
        assert not verdict.new

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def finish_too_old(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([name for name in WORKERS if self.held[name]]))
        grant = data.draw(st.sampled_from(list(self.held[worker].values())))
        place = sum(position < grant.lease for position in self.table._states)
        needed = self.table.version + place // self.groups - self.staleness
        if needed > 0:
            assert not self.table.accept(grant.lease, grant.attempt, needed - 1, (grant.lease, -1)).accepted
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
        """Much happens only after some updates, where a single event seldom leads."""
        self.grant(worker, 100)
        for grant in list(self.held[worker].values()):
            if grant.min_version <= self.table.version:
                del self.held[worker][grant.lease]
                assert self.table.accept(
                    grant.lease, grant.attempt, grant.min_version, (grant.lease, grant.min_version)
                ).new
                self.accepted.add(grant.lease)
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
        self.table.consume([position for position, _ in batch])

    @rule()
    def save(self) -> None:
        self.checkpoint = (self.table.cursor, self.table.version, len(self.consumed))

    @rule()
    def resume(self) -> None:
        cursor, version, consumed = self.checkpoint
        del self.consumed[consumed:]
        self.set_aside = {p for p in self.set_aside if p < cursor.position} | set(cursor.set_aside)
        self.open_table(cursor, version)

    # --- what must always hold ---

    @invariant()
    def each_position_is_consumed_once_or_set_aside_or_left_out(self) -> None:
        if hasattr(self, "table"):
            done = self.table.cursor.position
            assert sorted(self.consumed) == self.consumed
            assert self.consumed == [
                p for p in range(done) if p not in self.set_aside and not self.leaves_out(p)
            ]

    @invariant()
    def at_most_s_plus_one_updates_are_open(self) -> None:
        if hasattr(self, "table"):
            taken = self.accepted.difference(self.consumed)
            held = sum(len(leases) for leases in self.held.values())
            assert len(taken) + held <= (self.staleness + 1) * self.groups


Run.TestCase.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRun = Run.TestCase


def batches(seed: int, long: frozenset[int], groups: int, batch: int, staleness: int) -> set[frozenset[int]]:
    """Which leases were sampled together in a run of random timing, stopped and resumed at random."""
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
                table.accept(grant.lease, grant.attempt, table.version, grant.lease)
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
