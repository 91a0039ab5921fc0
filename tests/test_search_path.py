"""A file in the working folder, or next to the package, never replaces a module of the standard library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_actors import search_path

ROOT = Path(__file__).parent.parent
#: Modules of the standard library that Python has not loaded before it looks for the package.
NAMES = ("json", "statistics", "random", "logging", "socket", "queue", "copy")


def shadowed(folder):
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the working folder')\n")


def python(folder, *arguments, **environment):
    """Run Python in `folder` and return its output; the package is found as in a user's checkout."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("command", ["tail", "evaluator", "supervisor.entry grpo_actors.rollout"])
def test_a_command_in_such_a_folder_starts(tmp_path, command):
    shadowed(tmp_path)
    module, *rest = command.split()
    assert "usage" in python(tmp_path, "-m", f"grpo_actors.{module}", *rest, "--help", PYTHONPATH=str(ROOT))


def test_launch_starts_with_such_files_beside_it(tmp_path):
    shadowed(tmp_path)
    shutil.copy(ROOT / "launch.py", tmp_path)
    for name in ("grpo_actors", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {"PYTHONPATH": ""}
    printed = python(tmp_path, "launch.py", "--config", "quickstart.toml", "--dry-run", **environment)
    assert "quickstart" in printed
    assert "usage" in python(tmp_path, "-m", "grpo_actors.tail", "--help", **environment)


def test_a_program_that_imports_the_package_keeps_its_search_path(tmp_path):
    script = "import sys; before = list(sys.path); import grpo_actors; assert sys.path == before"
    python(tmp_path, "-c", script, PYTHONPATH=str(ROOT))


STANDARD = str(Path(os.__file__).parent)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            ["mine", "python.zip", STANDARD, f"{STANDARD}/lib-dynload", "installed"],
            ["python.zip", STANDARD, f"{STANDARD}/lib-dynload", "mine", "installed"],
        ),
        (["mine", STANDARD, "installed", "mine"], [STANDARD, "mine", "installed"]),
        ([STANDARD, "installed"], [STANDARD, "mine", "installed"]),
        (["installed", "more"], ["mine", "installed", "more"]),
    ],
)
def test_a_folder_comes_once_between_the_standard_library_and_installed_packages(monkeypatch, before, after):
    monkeypatch.setattr(sys, "path", list(before))
    search_path.put_after_standard_library("mine")
    assert sys.path == after


def test_the_folder_of_a_command_and_that_of_the_package_are_moved_if_they_are_searched(monkeypatch):
    monkeypatch.setattr(sys, "path", ["first", "second", STANDARD, "installed"])
    search_path.reorder_for_command()
    assert sys.path == ["second", STANDARD, "first", "installed"]
    beside = str(Path(search_path.__file__).parent.parent)
    monkeypatch.setattr(sys, "path", ["first", STANDARD, beside, "installed"])
    search_path.reorder_for_command()
    assert sys.path == [STANDARD, beside, "first", "installed"]
