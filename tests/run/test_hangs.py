"""Processes that hang in the middle of a run: each is killed and started again, and the run goes on.

A failpoint halts the loop of a process, while its threads and its sockets live.
"""

from collections.abc import Iterator

import pytest
from bounds import HANG_S
from runs import Run, new_run, wait_until

from grpo_actors.progress import LOST_S

pytestmark = pytest.mark.faults
#: Failpoint -> the process that hangs there, and what it works on.
HANGS = {
    "worker.sampling": ("rollout-0", "lease"),
    "learner.batch": ("learner", "update "),
    "evaluator.scored": ("evaluator", "checkpoint-"),
}


def hang(run: Run, failpoint: str) -> None:
    """Make a process hang at this failpoint; wait until it is ended."""
    name, _ = HANGS[failpoint]
    run.arm(failpoint, "hang")
    wait_until(lambda: next(run.failpoints.glob(f"{failpoint}.*"), None), f"{failpoint} fires", HANG_S)
    wait_until(lambda: f"\n{name} made no progress for " in run.stderr, f"{name} is ended", HANG_S)


@pytest.fixture(scope="module")
def run_with_hangs() -> Iterator[Run]:
    """The only worker, the learner (before its first checkpoint) and the evaluator hang one after another."""
    with new_run(max_updates=60, workers=1, eval_every_updates=20, save_steps=20) as run:
        run.environment["GRPO_ACTORS_LOST_S"] = "2"
        run.start("--set", "reward_timeout_s=0.1")
        run.wait_for("eval", update=0)
        for failpoint in HANGS:
            hang(run, failpoint)
        assert run.end(HANG_S) == 0, run.stderr
        yield run


def test_a_process_that_hangs_is_started_again_and_the_run_reaches_its_end(run_with_hangs):
    assert run_with_hangs.updates() == 60
    assert sorted(record["update"] for record in run_with_hangs.records("eval")) == [0, 20, 40, 60]
    for name, _ in HANGS.values():
        assert f"{name} made no progress for " in run_with_hangs.stderr


def test_before_it_is_killed_it_says_what_it_was_doing(run_with_hangs):
    lines = run_with_hangs.stderr.splitlines()
    for name, work in HANGS.values():
        (noticed,) = (i for i, line in enumerate(lines) if line.startswith(f"{name} has made no progress"))
        assert f" at {work}" in lines[noticed]
        ended = next(i for i, line in enumerate(lines) if line.startswith(f"{name} made no progress"))
        stacks = "\n".join(lines[noticed:ended])
        assert "in reach" in stacks
        assert f"/grpo_actors/{'rollout' if name.startswith('rollout') else name}/" in stacks


def test_nothing_trains_twice_and_nothing_is_lost(run_with_hangs):
    assert [lease for lease, *_ in run_with_hangs.ledger()] == list(range(120))
    run_with_hangs.assert_no_gap_in_records()
    assert run_with_hangs.records("alarm") == []


def test_a_run_whose_processes_hung_leaves_nothing(run_with_hangs):
    run_with_hangs.assert_nothing_left()


def test_a_process_may_be_silent_for_two_minutes():
    assert LOST_S == 120
