"""The commands that the program prints: they work where they are pasted."""

import shlex
import sys
from pathlib import Path

import pytest

from grpo_actors import invocation

NAMES = (invocation.SCRIPT, "python")


@pytest.fixture
def environments(monkeypatch, tmp_path):
    """Two folders of programs; those of the first run now."""
    folders = [tmp_path.resolve() / name / "bin" for name in ("own", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
        for name in NAMES:
            (folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folders[0] / "python"))
    return folders


@pytest.fixture
def program(monkeypatch):
    """Return how the program is called in a folder, with these folders of programs in PATH."""

    def called(path, folder):
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.chdir(folder)
        invocation._program.cache_clear()
        [found] = [word for word in shlex.split(invocation.pasted("runs")) if Path(word).name in NAMES]
        return found

    yield called
    invocation._program.cache_clear()


def test_a_program_goes_by_its_name_where_the_shell_finds_it_and_else_by_its_path(program, environments):
    own, other = environments
    name = Path(program("", other)).name
    assert program(own, other) == program(f"{own}:{other}", other) == name
    assert program("", other) == program(other, other) == str(own / name), "the shell would run another one"
    assert program(other, own.parent) == f"bin/{name}"


def test_a_command_for_another_folder_goes_there_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invocation.pasted("runs", "a b").endswith(" runs 'a b'")
    assert invocation.pasted("runs", within=tmp_path) == invocation.pasted("runs")
    (tmp_path / "my task").mkdir()
    assert invocation.pasted("train", within=Path("my task")).startswith("cd 'my task' && ")
