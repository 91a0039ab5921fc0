"""Trackers: real journals in, and TensorBoard's own reader on the files that were written."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S
from commands import run_here

from grpo_actors.config import Config, MetricsConfig
from grpo_actors.errors import ConfigError
from grpo_actors.observe.records import make_record
from grpo_actors.observe.sinks import Journal
from grpo_actors.trackers import check_installed
from grpo_actors.trackers.__main__ import guarded
from grpo_actors.trackers.feed import Feed
from grpo_actors.trackers.values import SAMPLES, fenced, hyperparameters, is_shown, markdown, values

SAMPLE = {
    "problem": "sum-1",
    "prompt": "1 + 1?",
    "answer": "2",
    "completions": [{"text": "It is ```2```", "reward": 1.0, "rewards": {}, "truncated": True}],
}


def begin(journal: Journal, update: int = 0, run_id: str = "a1b2c3d4e5f6") -> None:
    journal.append(
        "start",
        {
            "run_name": "test",
            "run_id": run_id,
            "total_updates": 40,
            "update": update,
            "config": Config().model_dump(mode="json"),
        },
    )


def write_update(journal: Journal, update: int, loss: float) -> None:
    journal.append("metrics", {"update": update, "loss": loss, "rewards": {"correctness": 0.5}})
    journal.append("sample", {"update": update, **SAMPLE})


def feed_all(folder: Path, name: str = "tensorboard") -> bool:
    """Act as one process: feed all records, then close. Return whether the run had ended."""
    feed = Feed(folder, name)
    feed.catch_up()
    feed.close()
    return feed.ended


def reader_of(folder: Path):
    """Open TensorBoard's own reader on the run's folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder / "trackers" / "tensorboard"))
    reader.Reload()
    return reader


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) as TensorBoard shows them."""
    return [(event.step, event.value) for event in reader_of(folder).Scalars(tag)]


@pytest.fixture
def needs_tensorboard():
    pytest.importorskip("tensorboard")


# --- values --------------------------------------------------------------------------------------


def test_all_finite_numbers_are_sent_by_group_and_unmeasured_ones_are_left_out():
    record = make_record(
        7,
        1.0,
        "metrics",
        {
            "update": 3,
            "total_updates": 9,
            "loss": 0.25,
            "kl": None,
            "entropy": float("nan"),
            "rewards": {"correctness": 0.5, "brevity": None},
            "staleness": {"0": 6, "1": 2},
            "ledger": [[1, 0, "p", "w"]],
        },
    )
    assert values(record) == {
        "train/loss": 0.25,
        "train_rewards/correctness": 0.5,
        "train_staleness/0": 6,
        "train_staleness/1": 2,
    }


def test_an_evaluation_has_its_own_group_and_a_boolean_is_not_a_number():
    record = make_record(1, 1.0, "eval", {"update": 3, "accuracy": 0.5, "best": True, "checkpoint": "/x"})
    assert values(record) == {"eval/accuracy": 0.5}


def test_an_estimate_is_sent_with_its_bounds_and_one_of_each_source_by_the_name_of_the_source():
    by_source = {"sums": {"value": 0.5, "low": 0.4, "high": 0.6}, "gsm8k": {"value": None}}
    record = make_record(1, 1.0, "eval", {"update": 3, "score": {"value": 0.5}, "by_source": by_source})
    assert values(record) == {"eval_score/value": 0.5, "eval_by_source/sums": 0.5}


def test_of_a_long_run_a_few_samples_are_shown():
    shown = [
        update
        for update in range(1, 1001)
        if is_shown(make_record(1, 1.0, "sample", {"update": update}), 1000)
    ]
    assert len(shown) == SAMPLES
    assert is_shown(make_record(1, 1.0, "sample", {"update": 1}), None)


def test_settings_are_flat_and_unset_ones_are_left_out():
    flat = hyperparameters(Config().model_dump(mode="json"))
    assert flat["learner.learning_rate"] == 1e-6
    assert flat["rollout.stop"] == "[]"
    assert "objective.algorithm" not in flat


def test_a_completion_cannot_leave_its_fence():
    assert fenced("a ``` b") == "````\na ``` b\n````"
    whole = (
        "**sum-1**\n\n```\n1 + 1?\n```\n\nanswer: `2`\n\nreward 1.0, truncated\n\n````\nIt is ```2```\n````"
    )
    assert markdown(SAMPLE) == whole


# --- settings ------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    # wandb keeps its files in a folder of its own name, which Python takes for a package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"\"wandb\" is not installed; pip install 'grpo-actors\[wandb\]'"):
        check_installed(("wandb",))


@pytest.mark.parametrize("settings", [{"log_jsonl": False}, {"trackers": ("wandb", "wandb")}])
def test_trackers_need_the_file_that_they_read_and_each_is_named_once(settings):
    with pytest.raises(ValueError, match=r"metrics\.trackers"):
        Config(metrics=MetricsConfig(**({"trackers": ("wandb",)} | settings)))


# --- TensorBoard ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_tensorboard")
def test_a_run_fed_in_parts_by_several_processes_has_each_step_once(tmp_path):
    assert not feed_all(tmp_path)  # there is no record yet
    with Journal(tmp_path) as journal:
        begin(journal)
        for update in range(1, 9):
            write_update(journal, update, loss=update / 8)
            if update % 3 == 0:
                journal.append("eval", {"update": update - 2, "accuracy": 0.5})
                assert not feed_all(tmp_path)
        journal.append("stop", {"reason": "all updates done", "exit_code": 0})
    assert feed_all(tmp_path)
    assert curve(tmp_path, "train/loss") == [(update, update / 8) for update in range(1, 9)]
    assert curve(tmp_path, "eval/accuracy") == [(1, 0.5), (4, 0.5)]
    # Each process has added a file to what the ones before have sent.
    assert len(list((tmp_path / "trackers" / "tensorboard").iterdir())) == 3


@pytest.mark.usefixtures("needs_tensorboard")
def test_the_repeated_values_of_a_resumed_run_replace_the_first(tmp_path):
    """Updates 1 to 5; the checkpoint of update 3 stored 7 records: the start and two of each update."""
    with Journal(tmp_path) as journal:
        begin(journal)
        for update in range(1, 6):
            write_update(journal, update, loss=0.0)
    feed_all(tmp_path)
    with Journal(tmp_path, seq=7) as journal:
        begin(journal, update=3)
        write_update(journal, 4, loss=1.0)
    feed_all(tmp_path)
    assert curve(tmp_path, "train/loss") == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0)]


@pytest.mark.usefixtures("needs_tensorboard")
def test_a_process_killed_before_saving_its_position_repeats_no_step(tmp_path):
    with Journal(tmp_path) as journal:
        begin(journal)
        write_update(journal, 1, loss=0.5)
        feed_all(tmp_path)
        noted = (tmp_path / "trackers" / "tensorboard.json").read_text()
        write_update(journal, 2, loss=0.25)
        feed_all(tmp_path)
        (tmp_path / "trackers" / "tensorboard.json").write_text(noted)
        feed_all(tmp_path)
    assert curve(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25)]


@pytest.mark.usefixtures("needs_tensorboard")
def test_a_new_run_in_the_same_folder_replaces_the_former_one(tmp_path):
    for run_id, loss in (("first", 0.5), ("second", 0.25)):
        with Journal(tmp_path) as journal:  # empties the file
            begin(journal, run_id=run_id)
            write_update(journal, 1, loss)
        feed_all(tmp_path)
    assert curve(tmp_path, "train/loss") == [(1, 0.25)]


@pytest.mark.usefixtures("needs_tensorboard")
def test_settings_and_samples_are_shown(tmp_path):
    with Journal(tmp_path) as journal:
        begin(journal)
        write_update(journal, 2, loss=0.5)
    feed_all(tmp_path)
    (sample,) = reader_of(tmp_path).Tensors("samples")
    assert sample.step == 2
    assert b"It is" in sample.tensor_proto.string_val[0]
    files = b"".join(path.read_bytes() for path in (tmp_path / "trackers" / "tensorboard").iterdir())
    assert b"learner.learning_rate" in files


@pytest.mark.usefixtures("needs_tensorboard")
def test_a_run_that_is_not_there_and_a_package_that_fails_are_one_line_each(tmp_path):
    done = run_here(guarded, tmp_path, "tensorboard")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path} has no metrics.jsonl: give the output folder of a run" in done.stderr
    with Journal(tmp_path) as journal:
        begin(journal)
        journal.append("stop", {"reason": "all updates done", "exit_code": 0})
    done = run_here(guarded, tmp_path, "tensorflow")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a tracker must be one of tensorboard, " in done.stderr
    assert run_here(guarded, tmp_path, "tensorboard").returncode == 0
    shutil.rmtree(tmp_path / "trackers")
    (tmp_path / "trackers").write_text("in the way")
    done = run_here(guarded, tmp_path, "tensorboard")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("FileExistsError: ")


# --- the other two -------------------------------------------------------------------------------


def test_trackio_has_each_step_once_also_of_a_resumed_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with Journal(tmp_path) as journal:
        begin(journal)
        for update in range(1, 4):
            write_update(journal, update, loss=0.5)
    by_hand(tmp_path, "trackio", ended=False)
    with Journal(tmp_path, seq=5) as journal:
        begin(journal, update=2)
        for update in (3, 4):
            write_update(journal, update, loss=0.25)
        journal.append("stop", {"reason": "all updates done", "exit_code": 0})
    by_hand(tmp_path, "trackio", ended=True)
    question = ["get", "metric", "--project", "grpo-actors", "--run", "test-a1b2c3", "--metric", "train/loss"]
    listed = subprocess.run(
        [sys.executable, "-m", "trackio.cli", *question, "--json"], capture_output=True, text=True, check=True
    )
    rows = json.loads(listed.stdout)["values"]
    # Update 3 is recorded twice; its first value stays.
    assert [(row["step"], row["value"]) for row in rows] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)]


def test_wandb_works_offline_without_a_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Journal(tmp_path) as journal:
        begin(journal)
        write_update(journal, 2, loss=0.5)
        journal.append("stop", {"reason": "all updates done", "exit_code": 0})
    by_hand(tmp_path, "wandb", ended=True)
    (file,) = (tmp_path / "trackers" / "wandb").glob("wandb/offline-run-*-a1b2c3d4e5f6/*.wandb")
    data = file.read_bytes()
    assert b"train/loss" in data
    assert b"learner.learning_rate" in data


def by_hand(folder: Path, name: str, *, ended: bool) -> None:
    """Run the command as a process, which the packages need; terminate it if the run has not ended."""
    command = [sys.executable, "-m", "grpo_actors.trackers", str(folder), name]
    output = folder / "said.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    note = folder / "trackers" / f"{name}.json"
    if not ended:
        while not note.exists() and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.terminate()
    assert process.wait(HANG_S) == 0, output.read_text()
    assert output.read_text() == ""
