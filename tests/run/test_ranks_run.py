"""Whole runs whose learner has two ranks, over MLX's ring back end: one rank dies or stops, and the run goes on."""

from collections.abc import Iterator

import pytest
from runs import Run, children, new_run, wait_until

SETTINGS = {"ranks": 2, "max_staleness": 0, "workers": 1, "eval_every_updates": 0, "save_steps": 4}


def fail(run: Run, action: str) -> None:
    """Let rank 1 fail in the sixth update or soon after it, before it adds its gradient to that of rank 0."""
    run.wait_for_update(5)
    run.arm("rank.computed", action)
    run.wait_for_failure("rank.computed")


@pytest.fixture(scope="module")
def run_with_a_death() -> Iterator[Run]:
    with new_run(max_updates=12, **SETTINGS) as run:
        run.start()
        fail(run, "kill")
        run.meeting_points = list(run.temporary.glob("grpo-actors-ranks-*"))
        run.before = run.curve()
        assert run.end() == 0, run.stderr
        yield run


def test_a_rank_that_dies_ends_the_learner_which_continues_from_its_checkpoint_to_the_bit(run_with_a_death):
    lines = run_with_a_death.stderr.splitlines()
    assert "rank 1 was ended by signal 9" in lines
    assert "learner lost one of its ranks; starts again in 1 s" in lines
    # Updates 5 and later were done twice.
    assert len(run_with_a_death.before) >= 5
    after = run_with_a_death.curve()
    assert after[: len(run_with_a_death.before)] == run_with_a_death.before
    assert len(after) == 12


def test_workers_stay_and_nothing_trains_twice(run_with_a_death):
    assert [lease for lease, *_ in run_with_a_death.ledger()] == list(range(24))
    run_with_a_death.assert_no_gap_in_records()
    assert not any(line.startswith("rollout-0 ") for line in run_with_a_death.stderr.splitlines())


def test_a_run_of_several_ranks_leaves_nothing_and_while_it_goes_on_no_file_by_which_they_met(
    run_with_a_death,
):
    assert run_with_a_death.meeting_points == []
    run_with_a_death.assert_nothing_left()


@pytest.mark.faults
def test_a_rank_that_is_stopped_ends_with_all_others_and_the_run_goes_on():
    with new_run(max_updates=8, **SETTINGS) as run:
        run.environment["GRPO_ACTORS_LOST_S"] = "2"
        run.start()
        learner = run.child("learner")
        wait_until(lambda: children(learner), "rank 1")
        fail(run, "stop")
        assert run.end() == 0, run.stderr
        assert "learner made no progress for 2 s" in run.stderr
        assert run.updates() == 8
        run.assert_nothing_left()


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_another_number_of_ranks_continues():
    with new_run(max_updates=8, **SETTINGS) as run:
        run.start()
        run.wait_for_update(2)
        run.signal(2)
        assert run.end() == 0, run.stderr
        done = run.curve()
        assert 2 <= len(done) < 8
        assert run.run("--set", "ranks=1") == 0, run.stderr
        assert run.curve()[: len(done)] == done
        assert run.updates() == 8
        run.assert_nothing_left()
