"""`grpo keys`: who is let in, and what a key's file is."""

from functools import partial

import pytest
from commands import run_here

from grpo_actors.keys.__main__ import MAX_NAME, main
from grpo_actors.transport.keys import ClientKey, KeyFolder


@pytest.fixture
def keys(tmp_path):
    """Return a function that runs the command in the test's folder; the learner's keys are in ``keys``."""
    return partial(run_here, main, "--keys-dir", "keys", cwd=tmp_path)


def names(folder):
    return [entry.name for entry in KeyFolder(folder / "keys").listed().values()]


def test_a_key_is_let_in_from_when_it_is_made_until_it_is_revoked(keys, tmp_path):
    made = keys("new", "laptop")
    assert (made.returncode, made.stderr) == (0, "")
    told = "give it to laptop only, and keep it at mode 600 there. It lets its holder in as worker."
    assert made.stdout == f"laptop.key: {told}\n"
    key = ClientKey.read(tmp_path / "laptop.key")
    [(public, entry)] = KeyFolder(tmp_path / "keys").listed().items()
    assert (
        (key.name, key.role, key.public) == (entry.name, entry.role, public) == ("laptop", "worker", public)
    )
    assert keys("new", "desk", "--role", "reader", "--output", "own.key").stdout.startswith("own.key: ")
    lines = keys("list").stdout.splitlines()
    assert lines[0] == f"laptop  worker  since {entry.since}  {public}"
    assert [line.split()[0] for line in lines] == ["laptop", "desk"]
    revoked = keys("revoke", "laptop")
    assert (revoked.returncode, revoked.stdout) == (0, "laptop is let in no more\n")
    assert names(tmp_path) == ["desk"]


@pytest.mark.parametrize("name", ["n" * MAX_NAME, "a b", "x.y", "n"])
def test_a_name_may_be_long_and_have_spaces_and_dots(keys, tmp_path, name):
    assert keys("new", name).returncode == 0
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["n" * (MAX_NAME + 1), "", "a\nb", "a/b", ".a"])
def test_a_name_that_makes_no_file_is_refused(keys, tmp_path, name):
    done = keys("new", name)
    assert done.returncode == 2
    rule = "NAME must have 1 to 100 printable characters and no slash"
    assert done.stderr == f"error: {rule}, got {name[:40]!r}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_or_has_no_folder_makes_no_key(keys, tmp_path):
    (tmp_path / "laptop.key").write_text("mine")
    there = keys("new", "laptop")
    assert there.stderr == "error: laptop.key: is there already; choose another --output, or remove it\n"
    assert (tmp_path / "laptop.key").read_text() == "mine"
    nowhere = keys("new", "laptop", "--output", "absent/laptop.key")
    assert nowhere.stderr == "error: absent: is no folder; choose another --output\n"
    assert (there.returncode, nowhere.returncode) == (2, 2)
    assert not (tmp_path / "keys").exists()


def test_a_key_whose_file_cannot_be_written_is_let_in_no_more(keys, tmp_path):
    name = "f" * 252  # its draft, which is four characters longer, is longer than a file's name may be
    done = keys("new", "laptop", "--output", name)
    assert done.returncode == 2
    assert done.stderr == f"error: {name}: cannot be written (File name too long); choose another --output\n"
    assert names(tmp_path) == []


def test_without_a_word_for_what_to_do_the_usage_is_told(keys):
    done = keys()
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")


def test_a_folder_of_keys_that_cannot_be_used_is_one_line(keys, tmp_path):
    (tmp_path / "keys").touch()
    done = keys("new", "laptop")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
