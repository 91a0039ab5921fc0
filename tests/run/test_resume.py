"""Runs that are interrupted in every way and continued by the same command, compared with one that was not."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Run, children, kill, living, new_run, wait_until

from grpo_actors.transport.weights.shared_memory import PREFIX, memory_folder


def shared_memory_of(learner: int) -> list[Path]:
    return list(memory_folder().glob(f"{PREFIX}{learner}-*"))


def left_by(run: Run, learner: int) -> list[Path]:
    """Return what a run that has ended left behind of what belongs to a live one."""
    addresses = [run.folder / "endpoints.json"]
    sockets = [path for path in run.temporary.iterdir() if path.name != "mlx"]
    return [*sockets, *(path for path in addresses if path.exists()), *shared_memory_of(learner)]


@pytest.fixture(scope="module")
def interrupted_run(on_policy_run) -> Iterator[Run]:
    """Run with the settings of `on_policy_run`; stop it by Ctrl-C, kill its learner, then its supervisor."""
    with new_run(**on_policy_run.settings | {"output_dir": ""}) as run:
        run.settings["output_dir"] = str(run.folder)
        run.start()
        run.wait_for_update(2)
        run.signal(signal.SIGINT)
        run.stopped_exit = run.end()
        run.stopped_at = run.updates()
        run.stopped_stderr = run.stderr

        run.start()
        run.wait_for_update(5)
        learner = run.child("learner")
        assert shared_memory_of(learner), "it has some, or this test shows nothing"
        kill(learner)
        run.learner_killed_exit = run.end()
        run.learner_killed_stderr = run.stderr
        run.after_learner_killed = left_by(run, learner)

        run.start()
        run.wait_for_update(8)
        learner = run.child("learner")
        family = [run.launched.pid, *(pid for pid, _ in children(run.launched.pid))]
        run.signal(signal.SIGKILL)
        wait_until(lambda: not living(family), "every child is gone")
        run.after_supervisor_killed = left_by(run, learner)

        run.start()
        wait_until(lambda: len(run.records("start")) == 4, "the run continues")
        learner = run.child("learner")
        run.signal(signal.SIGINT)
        wait_until(lambda: "Ctrl-C again stops at once" in run.stderr, "the first is noticed")
        run.signal(signal.SIGINT)
        run.end()
        run.after_two_ctrl_c = left_by(run, learner)

        assert run.run("--resume") == 0, run.stderr
        yield run


def test_ctrl_c_saves_and_exits_with_0(interrupted_run):
    assert interrupted_run.stopped_exit == 0
    assert "finishing the step and writing a checkpoint" in interrupted_run.stopped_stderr
    *_, checkpoint, again, chat, score = interrupted_run.stopped_stderr.splitlines()
    assert checkpoint.startswith(("best checkpoint: ", "last checkpoint: "))
    assert re.search(rf"continue it: .* train {interrupted_run.folder}/config.json$", again)
    assert [line.split(":")[0] for line in (chat, score)] == ["  chat with it", "  score it"]


def test_a_killed_learner_ends_the_run_and_says_that_the_same_command_continues_it(interrupted_run):
    assert interrupted_run.learner_killed_exit == 128 + signal.SIGKILL
    last = interrupted_run.learner_killed_stderr.splitlines()[-1]
    assert last.startswith(
        "the learner was ended by signal 9; the same command continues the run after update "
    )


@pytest.mark.parametrize("end", ["learner_killed", "supervisor_killed", "two_ctrl_c"])
def test_no_end_leaves_sockets_addresses_or_shared_memory(interrupted_run, end):
    assert getattr(interrupted_run, f"after_{end}") == []


def test_losses_rewards_gradients_and_weights_equal_the_uninterrupted_run_bit_by_bit(
    interrupted_run, on_policy_run
):
    assert interrupted_run.curve() == on_policy_run.curve()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_the_last_checkpoint_holds_the_same_bits(interrupted_run, on_policy_run, name):
    assert interrupted_run.tensors(12, name) == on_policy_run.tensors(12, name)


def test_the_ledger_equals_that_of_the_uninterrupted_run(interrupted_run, on_policy_run):
    assert interrupted_run.ledger() == on_policy_run.ledger()
    state, other = (
        json.loads((run.folder / "checkpoint-12" / "state.json").read_text())
        for run in (interrupted_run, on_policy_run)
    )
    assert state["cursor"] == other["cursor"] == {"position": 24, "set_aside": []}


def test_the_recorded_groups_equal_those_of_the_uninterrupted_run(interrupted_run, on_policy_run):
    recorded, other = ((run.folder / "groups.jsonl").read_bytes() for run in (interrupted_run, on_policy_run))
    assert recorded == other


def test_records_of_a_continued_run_have_neither_gap_nor_repeat(interrupted_run):
    interrupted_run.assert_no_gap_in_records()
    for topic in ("eval", "checkpoint"):
        updates = [record["update"] for record in interrupted_run.records(topic)]
        assert len(updates) == len(set(updates)), topic
    # Each start says from which update it continued; the last start is that of the resumed run.
    starts = [record["update"] for record in interrupted_run.records("start")]
    assert starts == sorted(starts)
    assert starts[0] == 0


def test_every_checkpoint_of_a_continued_run_is_evaluated(interrupted_run):
    evaluated = {record["update"] for record in interrupted_run.records("eval")}
    assert {0, *interrupted_run.checkpoints()} <= evaluated


def test_a_continued_run_leaves_nothing(interrupted_run):
    interrupted_run.assert_nothing_left()


def test_a_complete_run_says_so_and_trains_nothing(interrupted_run):
    before = (interrupted_run.folder / "metrics.jsonl").read_bytes()
    assert interrupted_run.run() == 0
    assert (
        f"{interrupted_run.folder}: complete, all 12 updates are done (checkpoint-12); "
        "raise learner.max_updates to train on, or choose another run.output_dir"
    ) in interrupted_run.stderr.splitlines()
    assert (interrupted_run.folder / "metrics.jsonl").read_bytes() == before
    interrupted_run.assert_nothing_left()


@pytest.mark.slow
def test_a_complete_run_trains_on_when_max_updates_is_raised(make_run):
    run = make_run(max_updates=4)
    assert run.run() == 0
    run.settings["max_updates"] = 7
    assert run.run() == 0
    run.assert_no_gap_in_records()
    assert run.updates() == 7
    assert [lease for lease, *_ in run.ledger()] == list(range(14))


@pytest.mark.slow
def test_an_adapter_and_its_optimizer_continue_bit_by_bit(make_run):
    settings = {"fine_tune_type": "lora", "kl_coeff": 0.1, "max_staleness": 0, "learning_rate": 1e-2}
    settings |= {"reference_refresh_updates": 2}  # the checkpoint has to carry the reference, too
    whole, cut = make_run(**settings), make_run(**settings)
    assert whole.run() == 0
    cut.start()
    cut.wait_for_update(3)
    kill(cut.child("learner"))
    assert cut.end() == 128 + signal.SIGKILL
    assert cut.run() == 0
    assert cut.curve() == whole.curve()
    for name in ("adapters.safetensors", "optimizer.safetensors", "reference.safetensors"):
        assert cut.tensors(6, name) == whole.tensors(6, name)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(make_run):
    run = make_run(max_staleness=0)
    assert run.run() == 0
    curve = run.curve()
    weights = run.folder / "checkpoint-6" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run.run() == 0
    assert f"alarm: checkpoint damaged: {weights}: not the file that was written" in run.stderr
    assert run.curve() == curve
    run.assert_no_gap_in_records()
    assert (run.folder / "checkpoint-6.damaged").is_dir()
    assert {0, 6} <= {record["update"] for record in run.records("eval")}


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(make_run):
    run = make_run(max_updates=2, keep_checkpoints=1)
    assert run.run() == 0
    (run.folder / "checkpoint-2" / "state.json").write_text("{}")
    before = (run.folder / "metrics.jsonl").read_bytes()
    assert run.run() == 2
    (line,) = run.said_after_start()
    assert line.startswith(f"error: {run.folder}/checkpoint-2/state.json: not the file that was written")
    assert "no other checkpoint is sound" in line
    assert (run.folder / "metrics.jsonl").read_bytes() == before
