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
    # Every second update has a checkpoint, and the newest alone is kept.
    run = faulty_run(**ON_POLICY | {"max_updates": 6, "workers": 0}, eval_every_updates=0)
    kill_at_each(("checkpoint.manifest", "folder.discarded"), run)


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


def kill_learner(run):
    kill(run.child("learner"))
    assert run.end() == 128 + signal.SIGKILL


def kill_supervisor(run):
    family = [pid for pid, _ in children(run.launched.pid)]
    run.signal(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    wait_until(lambda: not living(family), "every child is gone", deadline_s=BOUND_S)


def ctrl_c(run):
    run.signal(signal.SIGINT)
    assert run.end(deadline_s=BOUND_S) == 0


def ctrl_c_twice(run):
    run.signal(signal.SIGINT)
    wait_until(lambda: "finishing the step" in run.stderr, "the first is handled")
    run.signal(signal.SIGINT)
    assert run.end(deadline_s=BOUND_S) in (0, 128 + signal.SIGKILL)


#: Updates after which the run is interrupted, and how.
INTERRUPTIONS = {
    5: kill_supervisor,
    13: kill_learner,
    17: ctrl_c,
    24: kill_supervisor,
    32: ctrl_c_twice,
    41: kill_learner,
    46: kill_supervisor,
}


@pytest.mark.faults
def test_fifty_updates_with_seven_interruptions_equal_fifty_without(faulty_run, note_figures):
    settings = {"max_updates": 50, "workers": 1, "max_staleness": 0, "save_steps": 5}
    whole = faulty_run(**settings, eval_every_updates=0)
    whole.start()
    whole.end_well()
    cut = faulty_run(**settings, eval_every_updates=25)
    for update, interrupt in INTERRUPTIONS.items():
        cut.start()
        cut.wait_for_update(update)
        interrupt(cut)
    cut.start()
    cut.end_well()
    assert cut.curve() == whole.curve()
    assert len(cut.curve()) == 50
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert cut.tensors(50, name) == whole.tensors(50, name)
    note_figures(f"resume: 50 updates, {len(INTERRUPTIONS)} interruptions, all bits equal")
