"""Whole runs of which a model is divided among two ranks: one of them is killed, and the run goes on."""

import pytest
from runs import new_run

SETTINGS = {
    "workers": 1,
    "rollout_ranks": 2,
    "eval_every_updates": 0,
    "max_updates": 1,
    "max_new_tokens": 4,
    "max_staleness": 0,
    # The embedded model has no code. But each rank must be told what it may run.
    "trust_remote_code": True,
}


@pytest.fixture(scope="module")
def run():
    with new_run(**SETTINGS) as run:
        run.arm("rank.sampling", "kill")
        assert run.run() == 0, run.stderr
        yield run


def test_a_rank_that_is_killed_ends_the_worker_which_is_started_again(run):
    lines = run.stderr.splitlines()
    assert "rollout-0: rank 1 was ended by signal 9" in lines
    assert "rollout-0 lost one of its ranks; starts again in 1 s" in lines


def test_the_run_trains_all_the_same(run):
    assert run.updates() == 1
    assert [lease for lease, *_ in run.ledger()] == list(range(2))


def test_a_run_with_ranks_of_a_worker_leaves_nothing(run):
    run.assert_nothing_left()


@pytest.mark.slow
def test_a_run_whose_learner_divides_its_model_continues_after_a_death_and_with_a_whole_model():
    settings = {"fine_tune_type": "lora", "ranks": 2, "divide_model": True}
    with new_run(**SETTINGS | settings) as run:
        run.arm("rank.computed", "kill")
        assert run.run() == 0, run.stderr
        assert "learner lost one of its ranks; starts again in 1 s" in run.stderr.splitlines()
        assert run.updates() == 1
        whole = ("ranks=1", "divide_model=false", "rollout_ranks=1", "max_updates=2")
        assert run.run(*(f"--set={setting}" for setting in whole)) == 0, run.stderr
        assert run.updates() == 2
        run.assert_nothing_left()
