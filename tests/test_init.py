"""The files of a new task: all are written, or none; what is there stays."""

import json
import runpy
from functools import partial

import pytest
from commands import run_here

from grpo_actors.init.__main__ import COPIED, COUNT, PROBLEMS, main

FILES = [*COPIED, PROBLEMS]


@pytest.fixture
def init(tmp_path):
    """Return a function that runs the command in the test's folder."""
    return partial(run_here, main, cwd=tmp_path)


def test_the_files_are_written_and_named_and_the_next_commands_too(init, tmp_path):
    done = init("new/task")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "new" / "task").iterdir()) == sorted(FILES)
    *named, hint, trial, train = done.stdout.splitlines()
    assert [line.split()[0] for line in named] == [f"new/task/{name}" for name in FILES]
    assert hint.startswith("They train as they are.")
    assert [line.split(" && ")[0] for line in (trial, train)] == ["  cd new/task"] * 2
    assert (trial.endswith(" trial"), train.endswith(" train")) == (True, True)
    rows = [json.loads(line) for line in (tmp_path / "new" / "task" / PROBLEMS).read_text().splitlines()]
    assert len({row["question"] for row in rows}) == COUNT
    assert {type(row["answer"]) for row in rows} == {int}


def test_the_reward_of_a_new_task_gives_one_value_for_each_completion(init, tmp_path):
    assert init().returncode == 0
    reward = runpy.run_path(str(tmp_path / "rewards.py"))["shows_its_work"]
    assert reward(["2 + 3?"] * 2, ["2 + 3 = 5", "5"], [5, 5], level=1) == [1.0, 0.0]


def test_an_empty_folder_is_filled_and_a_file_that_is_there_stays(init, tmp_path):
    assert init().returncode == 0
    for name in FILES[1:]:
        (tmp_path / name).unlink()
    (tmp_path / FILES[0]).write_text("mine")
    refused = init()
    assert refused.returncode == 2
    assert refused.stderr == f"error: {FILES[0]}: is there already; choose another FOLDER, or remove it\n"
    assert [path.name for path in tmp_path.iterdir()] == [FILES[0]]
    assert (tmp_path / FILES[0]).read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(init, tmp_path):
    (tmp_path / "file").touch()
    refused = init("file/task")
    assert refused.returncode == 2
    assert refused.stderr == "error: file/task: cannot be written (Not a directory); choose another FOLDER\n"
