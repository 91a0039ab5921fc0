"""Training on recorded groups without a worker: the recorded run again, to the bit, or another objective."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S
from commands import run_here
from runs import ROOT, Run, wait_until

from grpo_actors.config import read_config
from grpo_actors.errors import ConfigError, DataError, RunError
from grpo_actors.learner.__main__ import main
from grpo_actors.learner.loop import train
from grpo_actors.learner.replay import open_replay
from grpo_actors.process import StopRequest
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.machine import Machine, equal_share
from grpo_actors.supervisor.preflight import check


def start(run: Run, source: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the learner as a user does, with the BLAS threads that it had next to one worker: more round differently."""
    own = run.environment | equal_share(Machine.here(asks_gpu=False), 2).environment
    command = [sys.executable, "-m", "grpo_actors.learner", str(run.folder), "--replay", str(source)]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=own, stderr=subprocess.PIPE, text=True)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for the process; return exit code and standard error."""
    _, stderr = process.communicate(timeout=HANG_S)
    return process.returncode, stderr


def here(run: Run, source: Path, *overrides: str) -> int:
    """Replay in this process, where an error is raised."""
    with open_replay(run.folder, source, None, overrides, StopRequest()) as opened:
        return train(opened)


def groups_of(run: Run) -> list[str]:
    return (run.folder / "groups.jsonl").read_text().splitlines()


@pytest.fixture
def recording(on_policy_run, tmp_path):
    """Return a function that writes lines of the recorded run, with its settings next to them."""
    (tmp_path / "config.json").write_bytes((on_policy_run.folder / "config.json").read_bytes())

    def write(lines):
        path = tmp_path / "groups.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def test_every_group_that_trained_is_recorded_in_the_order_of_consumption(on_policy_run):
    lines = [json.loads(line) for line in groups_of(on_policy_run)]
    assert [
        [g["lease"], g["epoch"], g["problem"]["id"], g["worker"]] for g in lines
    ] == on_policy_run.ledger()
    # Two groups an update, twelve updates.
    assert [g["update"] for g in lines] == [update for update in range(1, 13) for _ in range(2)]
    assert {g["planned_groups"] for g in lines} == {24}


def test_a_replay_repeats_the_run_to_the_bit(on_policy_run, make_run):
    run = make_run()
    code, stderr = end(start(run, on_policy_run.folder))
    assert code == 0, stderr
    assert run.curve() == on_policy_run.curve()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert run.tensors(12, name) == on_policy_run.tensors(12, name)
    assert run.ledger() == on_policy_run.ledger()
    run.assert_no_gap_in_records()
    assert "update 12/12" in stderr
    assert stderr.splitlines()[-1] == "run ended: all updates done"
    assert run.checkpoints() == [8, 10, 12]  # save_steps = 2, keep_checkpoints = 3
    assert not (run.folder / "endpoints.json").exists()
    again = run_here(main, run.folder, "--replay", on_policy_run.folder)
    assert again.returncode == 0
    assert "complete, all 12 updates are done" in again.stderr


def test_its_metrics_have_the_fields_of_a_live_run(on_policy_run, make_run):
    run = make_run()
    assert end(start(run, on_policy_run.folder, "--set", "max_updates=1"))[0] == 0
    (replayed,), live = run.records("metrics"), on_policy_run.records("metrics")[0]
    assert replayed.keys() == live.keys()
    # A replay samples nothing.
    its_own = {
        "seq",
        "session",
        "time",
        "total_updates",
        "update_s",
        "wait_s",
        "learner_wait_share",
        "rollout_wait_share",
        "memory_gb",
        "peers_memory_gb",
        "groups_resampled",
    }
    measured = {key for key in live if key not in its_own and not key.endswith("tokens_per_s")}
    assert {key: replayed[key] for key in measured} == {key: live[key] for key in measured}
    assert [r["problem"] for r in run.records("sample")] == [on_policy_run.records("sample")[0]["problem"]]


def test_an_interrupted_replay_goes_on_at_the_right_group(on_policy_run, make_run):
    run = make_run()
    process = start(run, on_policy_run.folder)
    wait_until(lambda: run.updates() >= 3 or process.poll() is not None, "three updates")
    process.send_signal(signal.SIGINT)
    code, stderr = end(process)
    assert code == 0, stderr
    stopped_at = run.updates()
    assert 3 <= stopped_at < 12
    assert run.records("stop")[0]["reason"] == f"asked to stop after update {stopped_at}"
    assert run.checkpoints()[-1] == stopped_at

    code, stderr = end(start(run, on_policy_run.folder))
    assert code == 0, stderr
    assert run.curve() == on_policy_run.curve()
    run.assert_no_gap_in_records()


def test_another_objective_trains_on_the_same_groups(on_policy_run, make_run):
    run = make_run()
    assert here(run, on_policy_run.folder / "groups.jsonl", "algorithm=gspo") == 0
    assert run.updates() == 12
    objective = run.records("start")[0]["config"]["objective"]
    assert (objective["loss"], objective["clip_eps"]) == ("gspo", 3e-4)
    assert run.ledger() == on_policy_run.ledger()
    assert run.curve()[-1] != on_policy_run.curve()[-1]


def test_updates_of_another_size_share_the_groups_out_anew(on_policy_run, make_run):
    run = make_run()
    # 24 groups in updates of 5: four updates, and 4 groups left over; the schedule ends there.
    assert here(run, on_policy_run.folder, "batch_size=5", "max_updates=0", "functions={correctness=1}") == 0
    assert [len(record["ledger"]) for record in run.records("metrics")] == [5] * 4
    assert {record["total_updates"] for record in run.records("metrics")} == {4}


def test_a_recording_that_ends_early_ends_the_replay_with_a_checkpoint(recording, on_policy_run, make_run):
    run = make_run()
    # Three groups of an interrupted run: one update of two, and one left over.
    assert end(start(run, recording(groups_of(on_policy_run)[:3])))[0] == 0
    assert run.curve() == on_policy_run.curve()[:1]
    assert run.records("stop")[0]["reason"] == "the recording ends after update 1"
    assert run.checkpoints() == [1]


# --- refusals ------------------------------------------------------------------------------------


def test_a_missing_file_is_one_line_and_exit_code_2(make_run):
    run = make_run()
    done = run_here(main, run.folder, "--replay", run.folder.parent / "nowhere")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {(run.folder.parent / 'nowhere').resolve()}: cannot be read")
    assert not run.folder.exists()


def test_settings_without_replay_are_a_usage_error(make_run):
    run = make_run()
    done = run_here(main, run.folder, "--set", "seed=1")
    assert done.returncode == 2
    assert "--config and --set need --replay" in done.stderr


def test_no_settings_next_to_the_groups(recording, on_policy_run, make_run, tmp_path):
    path = recording(groups_of(on_policy_run))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json: no such file; name the settings .* --config FILE"):
        here(make_run(), path)


def test_too_few_groups_for_one_update(recording, on_policy_run, make_run):
    path = recording(groups_of(on_policy_run)[:1])
    with pytest.raises(DataError, match="must have the 2 groups of one update, got 1"):
        here(make_run(), path)


def test_a_broken_line_stops_there_with_the_records_of_what_trained(recording, on_policy_run, make_run):
    run = make_run()
    lines = groups_of(on_policy_run)
    lines[4] = lines[4][:100]
    code, stderr = end(start(run, recording(lines)))
    assert code != 0
    assert "groups.jsonl:5: not a recorded group: Invalid JSON" in stderr
    assert run.curve() == on_policy_run.curve()[:2]


def test_groups_of_another_vocabulary(recording, on_policy_run, make_run):
    lines = groups_of(on_policy_run)
    document = json.loads(lines[0])
    document["completions"][0]["tokens"][0] = 151_643
    lines[0] = json.dumps(document)
    with pytest.raises(
        DataError, match=r"lease 0 .* token ids of tiny lie in 0 … \d+, got \d+ … 151643; set"
    ):
        here(make_run(), recording(lines))


def test_a_reward_that_was_not_recorded(on_policy_run, make_run):
    with pytest.raises(DataError, match="has no reward xml_count, only correctness, strict_format"):
        here(make_run(), on_policy_run.folder, "reward.functions={xml_count=1.0}")


def test_the_folder_of_the_recorded_run_itself(on_policy_run):
    before = (on_policy_run.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="holds the recorded run itself"):
        here(on_policy_run, on_policy_run.folder)
    assert (on_policy_run.folder / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_replays_something_else(recording, on_policy_run, make_run):
    run = make_run()
    assert here(run, on_policy_run.folder, "max_updates=1") == 0
    with pytest.raises(RunError, match=r"holds a replay of .*groups.jsonl, got a replay of .*groups.jsonl;"):
        here(run, recording(groups_of(on_policy_run)))


def test_a_live_run_does_not_go_on_where_a_replay_was_nor_the_other_way_round(on_policy_run, make_run):
    run = make_run()
    assert here(run, on_policy_run.folder, "max_updates=1") == 0
    before = (run.folder / "metrics.jsonl").read_bytes()
    config = read_config(run.folder / "config.json")
    with pytest.raises(RunError, match=r"holds a replay of .*groups.jsonl, got a live run; choose another"):
        check(config, allocate(config, Machine.here(asks_gpu=False)))
    assert (run.folder / "metrics.jsonl").read_bytes() == before
    other = make_run()
    shutil.copytree(on_policy_run.folder, other.folder)
    with pytest.raises(RunError, match=r"holds a live run, got a replay of .*groups.jsonl;"):
        here(other, on_policy_run.folder)


def test_a_folder_of_other_settings(on_policy_run, make_run):
    run = make_run()
    assert here(run, on_policy_run.folder, "max_updates=1") == 0
    with pytest.raises(RunError, match=r"run.seed was 0, is 1"):
        here(run, on_policy_run.folder, "seed=1")
