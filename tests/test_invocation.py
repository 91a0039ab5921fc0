"""The commands that the program prints: they work where they are pasted."""

import shlex
import sys
from pathlib import Path

import pytest

from grpo_actors import invocation

ROOT = Path(__file__).parents[1]
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


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Return a function that installs the package into the environment, from this address; None: not at all."""
    invocation._program.cache_clear()

    def install(url):
        distribution = tmp_path / "site" / "grpo_actors-1.dist-info"
        distribution.mkdir(parents=True, exist_ok=True)
        (distribution / "METADATA").write_text("Name: grpo-actors\nVersion: 1\n")
        if url:
            (distribution / "direct_url.json").write_text(f'{{"url": "{url}"}}')
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
        invocation._program.cache_clear()
        return distribution

    yield install
    invocation._program.cache_clear()


def test_what_is_not_installed_is_called_through_python_and_found_where_it_is(
    installed, environments, monkeypatch
):
    own, _ = environments
    monkeypatch.setenv("PATH", "")
    installed("file:///elsewhere")  # another clone
    monkeypatch.chdir(own.parent)
    assert invocation.pasted("runs") == f"env PYTHONPATH={ROOT} bin/python -m grpo_actors runs"
    monkeypatch.chdir(ROOT)
    assert invocation.pasted("runs") == f"{own}/python -m grpo_actors runs"
    monkeypatch.setattr(sys, "path", [])  # nothing of that name is installed
    monkeypatch.chdir(own.parent)
    assert " -m grpo_actors" in invocation.pasted("watch", within=own)
    assert "PYTHONPATH" in invocation.pasted("watch", within=own)


def test_what_is_installed_is_called_by_its_script_or_without_one_through_python(
    installed, environments, monkeypatch
):
    own, _ = environments
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(own)
    distribution = installed(ROOT.as_uri())  # an editable installation of this clone
    assert invocation.pasted("runs") == "grpo runs"
    (own / "grpo").chmod(0o644)
    invocation._program.cache_clear()
    assert invocation.pasted("runs") == "python -m grpo_actors runs"
    # A wheel: the package is next to what describes it.
    (distribution / "direct_url.json").unlink()
    invocation._program.cache_clear()
    assert "PYTHONPATH" in invocation.pasted("runs"), "a wheel in another place"
    monkeypatch.setattr(invocation, "_FOLDER", distribution.parent)
    invocation._program.cache_clear()
    assert invocation.pasted("runs") == "python -m grpo_actors runs"


def test_a_command_for_another_folder_goes_there_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invocation.pasted("runs", "a b").endswith(" runs 'a b'")
    assert invocation.pasted("runs", within=tmp_path) == invocation.pasted("runs")
    (tmp_path / "my task").mkdir()
    assert invocation.pasted("train", within=Path("my task")).startswith("cd 'my task' && ")
