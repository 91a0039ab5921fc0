"""A whole run from Python: the example of the README, executed as a notebook executes a cell."""

import contextlib
import json
import linecache
import os
import re
import sys
from pathlib import Path

import pytest
from commands import launch_here
from runs import processes

from grpo_actors.api import Run, generate, load, train
from grpo_actors.errors import RunError
from grpo_actors.rundir.outcome import continuing
from grpo_actors.runs.listing import listed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """The names that the README's example has defined, and what it has printed."""
    [code] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "grpo_actors.api" in block
    ]
    folder = tmp_path_factory.mktemp("notebook")
    printed = folder / "printed.txt"
    # As IPython does: the functions have no file and no module, and their source is known all the same.
    linecache.cache["<cell>"] = (len(code), None, code.splitlines(keepends=True), "<cell>")
    names = {"__name__": "notebook"}
    with contextlib.chdir(folder), printed.open("w") as file, contextlib.redirect_stdout(file):
        exec(compile(code, "<cell>", "exec"), names)  # noqa: S102 - our own example
    return names | {"printed": printed.read_text(), "where": folder}


@pytest.fixture
def run(cell) -> Run:
    return cell["run"]


def test_the_example_prints_a_score_rewards_an_answer_and_an_accuracy(cell, run):
    lines = cell["printed"].splitlines()
    assert lines[0] == f"{run.score} {run.best}"
    assert re.search(r"^2 +-?\d+\.\d+ +-?\d+\.\d+$", cell["printed"], re.MULTILINE)  # the row of update 2
    assert lines[-1].startswith("value=")


def test_events_come_in_order_from_the_first_one_also_afterwards_and_end_with_the_run(run):
    events = list(run)
    assert events == list(run)
    numbers = [event["seq"] for event in events if "seq" in event]
    assert numbers == list(range(1, len(numbers) + 1))
    file = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(e["seq"], e["topic"]) for e in events if "seq" in e] == [(r["seq"], r["topic"]) for r in file]
    assert [event["update"] for event in events if event["topic"] == "metrics"] == [1, 2]
    assert events[0]["topic"] == "phase"
    assert events[-1]["topic"] == "closing"


def test_metrics_are_a_frame_with_a_row_for_each_update(run):
    frame = run.metrics()
    assert list(frame.index) == [1, 2]
    assert frame["rewards/caller:brevity"].between(-1, 1).all()
    assert (frame["logged/shortest"] > 0).all()


def test_metrics_are_a_list_without_pandas(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = run.metrics()
    assert [row["update"] for row in rows] == [1, 2]
    assert {"loss", "rewards/correctness", "rewards/caller:brevity"} <= rows[0].keys()


def test_the_rows_are_kept_in_the_run_folder_under_a_name_that_follows_from_them(cell, run):
    [file] = run.folder.glob("data-*.jsonl")
    assert [json.loads(line) for line in file.read_text().splitlines()] == cell["rows"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert run.config.data.path == str(file)


def test_nothing_is_left_of_a_run_but_its_folder(run):
    assert not run.is_live
    assert [command for _, command in processes() if str(run.folder) in command] == []
    assert not (run.folder / "endpoints.json").exists()
    assert repr(run) == f"<Run {run.folder}, ended with 0>"


def test_the_commands_that_it_names_work_without_the_program(cell, run):
    [closing] = [event for event in run if event["topic"] == "closing"]
    assert "score it" not in closing["commands"]
    assert not any("--attach" in event["text"] for event in run if event["topic"] == "note")
    refused = launch_here("outputs/doubling/config.json", cwd=cell["where"], environment=os.environ)
    assert refused.returncode == 2
    assert "caller:brevity lives in the notebook or script that started the run" in refused.stderr


def test_the_list_of_runs_names_the_call_that_continues_it(cell, run, monkeypatch):
    monkeypatch.chdir(cell["where"])
    folder = Path("outputs/doubling")
    assert listed(folder).state == "done"
    assert continuing(folder, run.config) == (
        "in Python, train(config='outputs/doubling/config.json', rewards={'correctness': 2, brevity: 0.5})"
    )


def test_a_run_and_its_folder_load_with_the_prompt_of_the_training(run):
    model, of_folder = load(run), load(run.folder)
    assert model.name == of_folder.name == str(run.best or run.folder / "checkpoint-2")
    assert "Work the problem out step by step" in model.system
    assert load(run, system="").system == ""
    assert generate(model, "What is 4 + 4?", temperature=0) == generate(run, "What is 4 + 4?", temperature=0)


def test_a_run_in_the_folder_of_other_data_is_refused_when_it_starts(cell, run):
    with pytest.raises(RunError) as error:
        train(
            config=run.folder / "config.json",
            output_dir=str(run.folder),
            data=[{"question": f"And {n}?", "answer": n} for n in range(9)],
            rewards=[cell["brevity"]],
            max_new_tokens=32,
        )
    assert str(error.value).startswith(f"{run.folder}: run.output_dir: ")
    assert "has trained on other data" in str(error.value)
