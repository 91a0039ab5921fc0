"""Stopping at any time: the first signal saves, the second ends the run at once."""

import signal

import pytest
from runs import children, living, wait_until


def test_a_second_ctrl_c_ends_everything_at_once(make_run):
    run = make_run(max_updates=100_000, save_steps=0, eval_every_updates=0)
    run.arm("learner.batch", "hang")  # an update that never ends
    run.start()
    run.wait_for_failure("learner.batch")
    family = [pid for pid, _ in children(run.launched.pid)]
    run.signal(signal.SIGINT)
    wait_until(lambda: "finishing the step" in run.stderr, "the first is handled")
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGKILL
    assert not living(family)
    run.assert_nothing_left()


def test_ctrl_c_before_the_model_is_loaded_ends_quietly(make_run):
    run = make_run(eval_every_updates=0)
    run.start()
    run.child("learner")
    run.signal(signal.SIGINT)
    assert run.end() == 0
    assert "Traceback" not in run.stderr
    assert run.records("metrics") == []
    assert run.checkpoints() == []
    run.assert_nothing_left()


@pytest.mark.slow
def test_ctrl_c_while_evaluations_are_waited_for_leaves_them_to_the_next_start(make_run):
    run = make_run(max_updates=2, eval_subset_size=2000, eval_batch_size=8, eval_every_updates=2)
    run.start()
    run.wait_for("worker", worker="rollout-0", state="left")
    run.signal(signal.SIGINT)
    assert run.end() == 0
    assert run.records("eval", update=2) == []
    run.settings["eval_subset_size"] = 4
    assert run.run() == 0
    assert len(run.records("eval", update=2)) == 1
    assert run.updates() == 2
    run.assert_no_gap_in_records()
