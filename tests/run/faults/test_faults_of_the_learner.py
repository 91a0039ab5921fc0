"""A learner or a supervisor that dies or halts: the same command continues the run, to the same bits."""

import signal
import time

import pytest
from runs import children, kill, living, wait_until

#: Seconds that an end may take here; what it takes on a quiet machine is measured by `test_times`.
BOUND_S = 120.0
#: One update is the result of the one before, whoever was killed in between.
ON_POLICY = {"max_updates": 12, "workers": 1, "max_staleness": 0, "keep_checkpoints": 1}

#: Where the learner is when it dies. In a checkpoint: its folder is empty; its arrays are written; it has no manifest; it
#: has its name. Then an old one is being removed.
IN_A_CHECKPOINT = (
    "checkpoint.begun",
    "checkpoint.written",
    "checkpoint.manifest",
    "checkpoint.sealed",
    "folder.discarded",
)
#: A batch is taken; the weights have changed; they are published.
IN_A_STEP = ("learner.batch", "learner.updated", "learner.published")


def kill_at_each(moments, run):
    for moment in moments:
        run.arm(moment, "kill")
        run.start()
        run.learners.add(run.wait_for_failure(moment))
        assert run.end() == 128 + signal.SIGKILL
    run.start()
    run.end_well()
    assert run.exit_codes == [128 + signal.SIGKILL] * len(moments) + [0]


def test_a_learner_killed_while_a_checkpoint_gets_its_name_and_while_an_old_one_goes(faulty_run):
    kill_at_each(("checkpoint.manifest", "folder.discarded"), faulty_run(**ON_POLICY, eval_every_updates=0))


@pytest.mark.faults
@pytest.mark.parametrize("moments", [IN_A_CHECKPOINT, IN_A_STEP], ids=["in a checkpoint", "in a step"])
def test_a_learner_killed_at_every_stage(faulty_run, on_policy_run, moments):
    run = faulty_run(**ON_POLICY)
    kill_at_each(moments, run)
    assert run.curve() == on_policy_run.curve()


@pytest.mark.faults
def test_a_learner_halted_for_a_while(start_run):
    run = start_run(max_updates=20, workers=2)
    learner = run.child("learner")
    kill(learner, signal.SIGSTOP)
    time.sleep(5)  # the fault itself: longer than every heartbeat
    kill(learner, signal.SIGCONT)
    run.end_well()
    assert run.exit_codes == [0]


@pytest.mark.faults
def test_a_supervisor_killed_again_and_again(start_run, on_policy_run):
    run = start_run(**ON_POLICY)
    for update in (3, 5, 9):
        run.wait_for_update(update)
        family = [pid for pid, _ in children(run.launched.pid)]
        run.signal(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        wait_until(lambda f=family: not living(f), "every child is gone", deadline_s=BOUND_S)
        run.start()
    run.end_well()
    assert run.curve() == on_policy_run.curve()


@pytest.mark.faults
def test_ctrl_c_once_and_then_twice(start_run, on_policy_run):
    run = start_run(**ON_POLICY)
    run.wait_for_update(3)
    run.signal(signal.SIGINT)
    assert run.end(deadline_s=BOUND_S) == 0
    run.start()
    run.wait_for_update(6)
    run.signal(signal.SIGINT)
    wait_until(lambda: "finishing the step" in run.stderr, "the first is handled")
    run.signal(signal.SIGINT)
    assert run.end(deadline_s=BOUND_S) in (0, 128 + signal.SIGKILL)
    run.start()
    run.end_well()
    assert run.curve() == on_policy_run.curve()


@pytest.mark.faults
def test_fifty_updates_with_five_interruptions_equal_fifty_without(faulty_run, note_figures):
    settings = {"max_updates": 50, "workers": 1, "max_staleness": 0, "eval_every_updates": 0, "save_steps": 5}
    whole, cut = faulty_run(**settings), faulty_run(**settings)
    whole.start()
    whole.end_well()
    cut.start()
    for update, number, of_learner in (
        (7, signal.SIGKILL, True),
        (16, signal.SIGKILL, False),
        (25, signal.SIGINT, False),
        (34, signal.SIGKILL, True),
        (43, signal.SIGINT, False),
    ):
        cut.wait_for_update(update)
        if of_learner:
            kill(cut.child("learner"), number)
        else:
            cut.signal(number)
        cut.end()
        cut.start()
    cut.end_well()
    assert cut.curve() == whole.curve()
    assert len(cut.curve()) == 50
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert cut.tensors(50, name) == whole.tensors(50, name)
    note_figures(f"resume: 50 updates, {len(cut.exit_codes) - 1} interruptions, all bits equal")
