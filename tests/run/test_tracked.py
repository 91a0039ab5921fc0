"""Trackers of a real run: they get every record, are started again when they die, and never end the run."""

import importlib.util
import json
import signal

import pytest
from commands import launch_here
from runs import children, kill, wait_until

if importlib.util.find_spec("tensorboard") is None:
    pytest.skip("needs tensorboard", allow_module_level=True)


def curve(run, tag):
    from tensorboard.backend.event_processing import event_accumulator

    reader = event_accumulator.EventAccumulator(str(run.folder / "trackers" / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def tracker(run):
    """Wait for the tracker; return its process id."""

    def found():
        return [pid for pid, command in children(run.launched.pid) if "grpo_actors.trackers" in command]

    return wait_until(found, "a tracker")[0]


def test_a_tracker_that_is_killed_comes_back_and_a_resumed_run_has_each_step_once(make_run):
    run = make_run(trackers=["tensorboard"], workers=0)
    run.start()
    note = run.folder / "trackers" / "tensorboard.json"
    wait_until(note.exists, "the tracker has been given something")
    kill(tracker(run))
    wait_until(lambda: "tensorboard was ended by signal 9; starts again in 1 s" in run.stderr, run.stderr)
    run.wait_for_update(3)
    run.signal(signal.SIGINT)
    assert run.end() == 0, run.stderr
    assert run.run() == 0, run.stderr
    losses = [(record["update"], record["loss"]) for record in run.records("metrics")]
    assert len(losses) == 6
    assert curve(run, "train/loss") == [(update, pytest.approx(loss, rel=1e-6)) for update, loss in losses]
    evaluations = [(record["update"], record["accuracy"]) for record in run.records("eval")]
    assert curve(run, "eval/accuracy") == [
        (update, pytest.approx(accuracy, rel=1e-6)) for update, accuracy in evaluations
    ]
    run.assert_nothing_left()


def test_a_tracker_that_cannot_write_is_a_line_and_the_run_goes_on(make_run):
    run = make_run(trackers=["tensorboard"], eval_every_updates=0, workers=0)
    run.folder.mkdir()
    (run.folder / "trackers").write_text("in the way")
    assert run.run() == 0, run.stderr
    assert run.updates() == 6
    (error,) = {line for line in run.stderr.splitlines() if line.startswith("tensorboard: ")}
    assert "NotADirectoryError" in error or "FileExistsError" in error


def test_an_unknown_tracker_is_refused_with_the_list(make_run):
    run = make_run()
    done = launch_here(*run.launch_arguments("--set", f"trackers={json.dumps(['wanbd'])}"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'metrics.trackers must be a list of "tensorboard", "wandb", "trackio", got "wanbd" at [0]' in line
