"""`grpo runs` and ``--again`` on run folders as runs write them."""

import json
import os
import subprocess

import pytest
from bounds import HANG_S
from checkpoint_files import write_checkpoint_files
from commands import launch_here, run_here

from grpo_actors.config import load_config
from grpo_actors.observe.records import encode, make_record
from grpo_actors.rundir.folder import locked
from grpo_actors.runs.__main__ import main
from grpo_actors.runs.again import unfinished_folder
from grpo_actors.runs.listing import find_runs, listed


def write_run(folder, *, update, total=6, end=None):
    """Write the files of a run that has ended after `update` updates; `end`: the fields of its stop record."""
    folder.mkdir(parents=True)
    config = load_config("smoke_test.toml", [f"output_dir={folder}"]).config
    (folder / "config.json").write_text(config.model_dump_json())
    topics = [("start", {"total_updates": total}), ("metrics", {"update": update, "total_updates": total})]
    topics += [("stop", end)] if end else []
    lines = [encode(make_record(i, 1e9 + i, *topic)) + b"\n" for i, topic in enumerate(topics, 1)]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    (folder / "lock").touch()
    if update:
        write_checkpoint_files(folder, update)
    return folder


STOPPED = {"reason": "stopped after update 4", "exit_code": 0}


@pytest.mark.parametrize(
    ("update", "end", "state"),
    [
        (6, {"reason": "all updates done", "exit_code": 0}, "done"),
        (4, STOPPED, "stopped"),
        (4, {"reason": "alarm: loss is NaN", "exit_code": 1}, "failed"),
        (4, None, "killed"),
    ],
)
def test_the_state_of_a_run_that_is_over_comes_from_its_last_records(tmp_path, update, end, state):
    run = listed(write_run(tmp_path / "run", update=update, end=end))
    assert (run.state, run.update, run.total_updates) == (state, update, 6)
    assert (run.model, run.task, run.score) == ("tiny", "arithmetic", "not evaluated")
    assert bool(run.next) == (state != "done")


def test_a_run_whose_lock_is_held_is_live_and_is_to_be_watched(tmp_path):
    folder = write_run(tmp_path / "run", update=4)
    with locked(folder):
        run = listed(folder)
    assert run.state == "live"
    assert f"watch {folder}" in run.next


def test_runs_are_found_below_a_folder_but_not_in_checkpoints_and_the_newest_is_last(tmp_path, capsys):
    old, new = (write_run(tmp_path / name, update=4, end=STOPPED) for name in ("b/c/old", "a"))
    lines = (old / "metrics.jsonl").read_text().replace('"time":1000000003.0', '"time":1000000002.0')
    (old / "metrics.jsonl").write_text(lines)
    (new / "checkpoint-4" / "config.json").touch()
    (new / "checkpoint-4" / "lock").touch()
    write_run(new / "exported" / "copy", update=4)  # belongs to the run that it is in
    write_run(tmp_path / "1" / "2" / "3" / "too deep", update=4)
    assert set(find_runs(tmp_path)) == {old, new}
    assert main([str(tmp_path), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [run["folder"] for run in found] == [str(old), str(new)]


@pytest.mark.parametrize(
    ("files", "is_run"),
    [
        (["config.json", "metrics.jsonl"], True),
        (["config.json", "lock"], True),
        (["config.json"], False),  # a model
        (["metrics.jsonl", "lock"], False),
    ],
)
def test_a_run_has_settings_and_records_or_a_lock(tmp_path, files, is_run):
    for name in files:
        (tmp_path / name).touch()
    assert list(find_runs(tmp_path)) == [tmp_path] * is_run


def test_a_run_without_records_is_known_by_its_settings_and_its_newest_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run", update=0)
    (folder / "metrics.jsonl").unlink()
    os.utime(folder / "config.json", (5.0, 5.0))
    run = listed(folder)
    # The settings of smoke_test have max_updates = 4.
    assert (run.state, run.update, run.total_updates, run.at) == ("killed", 0, 4, 5.0)
    for update in (2, 3):
        write_checkpoint_files(folder, update)
    assert listed(folder).update == 3


def test_what_a_resumed_run_has_recorded_since_its_start_counts(tmp_path):
    folder = write_run(tmp_path / "run", update=4, end=STOPPED)
    with (folder / "metrics.jsonl").open("ab") as records:
        records.write(encode(make_record(4, 2e9, "start", {"total_updates": 6})) + b"\n" + b'{"seq": 5, "ti')
    run = listed(folder)
    assert (run.state, run.update, run.at) == ("killed", 4, 2e9)


def test_a_run_that_ended_before_its_first_update_has_its_total_from_its_start(tmp_path):
    folder = write_run(tmp_path / "run", update=0)
    start, *_ = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(start)
    run = listed(folder)
    assert (run.state, run.update, run.total_updates) == ("killed", 0, 6)


def test_a_run_on_recorded_groups_continues_with_them_as_its_newest_checkpoint_says(tmp_path):
    folder = write_run(tmp_path / "run", update=0)
    write_checkpoint_files(folder, 2, recording="/earlier")
    write_checkpoint_files(folder, 4, recording="/former run")
    assert listed(folder).next.endswith(f" replay '/former run' {folder}")
    (folder / "checkpoint-4" / "state.json").write_text("{}")
    assert " replay " not in listed(folder).next


def test_scores_that_cannot_be_read_are_said_in_their_place(tmp_path):
    folder = write_run(tmp_path / "run", update=4, end=STOPPED)
    (folder / "best.json").write_text("{")
    assert listed(folder).score.startswith(f"{folder}/best.json: ")


def test_the_command_that_continues_a_moved_run_leads_to_where_it_is_now(tmp_path):
    write_run(tmp_path / "before", update=4, end=STOPPED).rename(tmp_path / "after")
    command = listed(tmp_path / "after").next
    done = subprocess.run(
        ["sh", "-c", f"{command} --dry-run --json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
    )
    assert json.loads(done.stdout)["config"]["run"]["output_dir"] == str(tmp_path / "after")


def test_an_unfinished_run_continues_and_a_finished_one_stays(tmp_path):
    run = tmp_path / "run"
    assert unfinished_folder(run) == (run, f"{run}: a new run")
    write_run(run, update=6)
    second = tmp_path / "run-2"
    stays = f"; the one in {run} is done and stays as it is"
    assert unfinished_folder(run) == (second, f"{second}: a new run{stays}")
    write_run(second, update=4)
    assert unfinished_folder(run) == (second, f"{second}: continues its run after update 4")
    (second / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert unfinished_folder(run)[0] == tmp_path / "run-3"


def test_again_trains_beside_a_finished_run(tmp_path):
    run = write_run(tmp_path / "run", update=6)
    settings = ("smoke_test", "--set", f"output_dir={run}", "--again", "--dry-run", "--json")
    done = launch_here(*settings)
    assert done.returncode == 0
    assert json.loads(done.stdout)["config"]["run"]["output_dir"] == f"{run}-2"
    assert done.stderr.startswith(f"{run}-2: a new run; the one in {run} is done")


def test_a_folder_without_runs_and_a_run_that_cannot_be_read_are_said_on_stderr(tmp_path):
    done = run_here(main, tmp_path / "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path / 'nowhere'}: no such folder" in done.stderr
    done = run_here(main, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"no run in {tmp_path}\n")
    done = run_here(main, tmp_path, "--json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run = write_run(tmp_path / "run", update=4, end=STOPPED)
    (write_run(tmp_path / "newer", update=4) / "config.json").write_text("{")
    done = run_here(main, cwd=tmp_path)
    assert done.stdout.startswith(f"{run.name}  stopped, update 4 of 6, ")
    assert "  tiny on arithmetic\n  not evaluated\n  continue: " in done.stdout
    assert done.stderr.startswith("note: newer/config.json: ")
