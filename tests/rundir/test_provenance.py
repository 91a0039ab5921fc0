"""Which code and libraries a result comes from."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from grpo_actors import __version__
from grpo_actors.rundir import provenance


def test_the_libraries_that_affect_results_are_named_with_their_versions():
    assert provenance.versions() == {
        "grpo-actors": __version__,
        **{name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")},
    }


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in the place of the package's checkout."""
    assert (provenance._CHECKOUT / "grpo_actors" / "rundir" / "provenance.py").samefile(provenance.__file__)
    monkeypatch.setattr(provenance, "_CHECKOUT", tmp_path)
    return tmp_path


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_says_whether_files_differ(checkout):
    git(checkout, "init", "-q")
    (checkout / "file").write_text("as committed")
    git(checkout, "add", "file")
    git(checkout, "commit", "-q", "-m", "first")
    git(checkout, "tag", "v1")  # a tag's name is no commit
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.commit() == head
    (checkout / "file").write_text("changed")
    assert provenance.commit() == f"{head}-dirty"


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_checkout_there_is_no_commit_also_within_another_one(checkout, monkeypatch, broken):
    git(checkout, "init", "-q")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "of another project")
    inner = checkout / "site-packages"
    inner.mkdir()
    if broken:
        (inner / ".git").write_text("gitdir: /nowhere")
    monkeypatch.setattr(provenance, "_CHECKOUT", inner)
    assert provenance.commit() is None
