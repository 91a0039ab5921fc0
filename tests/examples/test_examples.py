"""Each example does what its README says: its own command, in a copy of its folder, with a figure that it promises.

The promises are far below the figures in the READMEs: another machine computes other bits.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.rundir.folder import REPORT_FILE

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))


def command_of(name: str) -> str:
    """The first command of an example's README."""
    found = re.search(r"```sh\n(.*?)```", (EXAMPLES / name / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def ran(name: str, folder: Path) -> Path:
    """Run the example in a copy of its folder, elsewhere; return the copy."""
    copy = folder / name
    shutil.copytree(EXAMPLES / name, copy, ignore=shutil.ignore_patterns("outputs", "__pycache__"))
    programs = folder / "programs"
    programs.mkdir()
    grpo = programs / "grpo"
    grpo.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m grpo_actors "$@"\n')
    grpo.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["sh", "-ec", command_of(name)]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=5 * HANG_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


def records(copy: Path, run: str, topic: str) -> list[dict]:
    lines = (copy / "outputs" / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["topic"] == topic]


def scores(copy: Path, run: str) -> list[float]:
    return [record["score"]["value"] for record in records(copy, run, "eval")]


def test_every_example_is_tested_and_in_the_index():
    tested = {name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")}
    index = (EXAMPLES / "README.md").read_text()
    assert set(FOLDERS) == tested == set(re.findall(r"\]\((\w+)/?\)", index))


@pytest.mark.examples
def test_example_own_reward(tmp_path):
    copy = ran("own_reward", tmp_path)
    base, trained = scores(copy, "own_reward")
    assert trained > base + 0.15
    updates = records(copy, "own_reward", "metrics")
    first, *_, last = [record["logged"]["no_work"] for record in updates]
    assert last < first / 2
    page = (copy / "outputs" / "own_reward" / REPORT_FILE).read_text()
    assert "own_reward" in page
    assert str(tmp_path) not in page


@pytest.mark.examples
def test_example_own_data(tmp_path):
    base, *_, trained = scores(ran("own_data", tmp_path), "own_data")
    assert trained > base + 0.3


@pytest.mark.examples
def test_example_mixture(tmp_path):
    copy = ran("mixture", tmp_path)
    updates, evaluations = records(copy, "mixture", "metrics"), records(copy, "mixture", "eval")
    assert all(record["groups_by_source"] == {"words": 4, "bus": 2, "digits": 2} for record in updates)
    base, *_, trained = [record["by_source"] for record in evaluations]
    assert all(trained[name]["value"] > base[name]["value"] for name in ("words", "bus", "digits"))


@pytest.mark.examples
def test_example_environment(tmp_path):
    copy = ran("environment", tmp_path)
    turns = [record["turns_mean"] for record in records(copy, "environment", "metrics")]
    assert turns[-1] > turns[0] + 0.4
    base, *_, trained = scores(copy, "environment")
    assert trained > base + 0.15


@pytest.mark.examples
def test_example_lora(tmp_path):
    copy = ran("lora", tmp_path)
    base, *_, trained = scores(copy, "lora")
    assert trained > base + 0.15
    [adapter] = (copy / "outputs" / "lora" / "checkpoint-40").glob("*adapters.safetensors")
    assert adapter.stat().st_size < 300_000


@pytest.mark.examples
def test_example_curriculum(tmp_path):
    copy = ran("curriculum", tmp_path)
    updates = records(copy, "curriculum", "metrics")
    assert {record["zero_variance_share"] for record in updates} == {0.0}
    assert sum(record["problems_skipped"] for record in updates) > 0
    base, *_, trained = scores(copy, "curriculum")
    assert trained > base + 0.3


@pytest.mark.examples
def test_example_replay(tmp_path):
    copy = ran("replay", tmp_path)
    runs = ("recorded", "again", "gspo")
    first = [records(copy, run, "metrics")[0]["loss"] for run in runs]
    last = [records(copy, run, "policy")[-1]["digest"] for run in runs]
    # Sums of another number of threads round differently.
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert last[0] != last[2]


@pytest.mark.examples
def test_example_notebook(tmp_path):
    copy = tmp_path / "notebook"
    copy.mkdir()
    cells = json.loads((EXAMPLES / "notebook" / "notebook.ipynb").read_text())["cells"]
    (copy / "cells.json").write_text(
        json.dumps(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    )
    # The cells one after the other in one interpreter and one namespace, as a kernel runs them.
    program = "import json\nfor cell in json.load(open('cells.json')):\n    exec(compile(cell, 'cell', 'exec'), globals())\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=5 * HANG_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    base, *_, trained = scores(copy, "notebook")
    assert trained > base + 0.3
