"""A whole run whose worker has two ranks, which share its model: one of them is killed, and the run goes on."""

import pytest
from runs import new_run

SETTINGS = {
    "workers": 1,
    "rollout_ranks": 2,
    "eval_every_updates": 0,
    "max_updates": 2,
    "max_new_tokens": 6,
    "max_staleness": 0,
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
    assert run.updates() == 2
    assert [lease for lease, *_ in run.ledger()] == list(range(4))


def test_a_run_with_ranks_of_a_worker_leaves_nothing(run):
    run.assert_nothing_left()
