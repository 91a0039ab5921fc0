"""Key files, and the list of keys that a learner lets in."""

import json
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from grpo_actors.errors import RunError
from grpo_actors.keys.__main__ import main
from grpo_actors.transport.keys import ClientKey, KeyFolder, read_run_key, run_key


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return KeyFolder(tmp_path / "keys")


def test_every_file_is_readable_by_its_owner_only_whatever_the_umask(folder, tmp_path):
    os.umask(0o000)
    folder.new("laptop", "worker").write(tmp_path / "laptop.key")
    files = [folder.folder / "learner.json", folder.folder / "allowed.json", tmp_path / "laptop.key"]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600] * 3
    assert folder.folder.stat().st_mode & 0o777 == 0o700


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601])
def test_a_file_that_others_may_open_is_refused_with_the_cure(folder, tmp_path, mode):
    path = tmp_path / "laptop.key"
    folder.new("laptop", "worker").write(path)
    for secret, read in (
        (path, lambda: ClientKey.read(path)),
        (folder.folder / "learner.json", folder.learner),
        (folder.folder / "allowed.json", folder.listed),
    ):
        secret.chmod(mode)
        with pytest.raises(RunError, match=r"other users may open it, .*chmod 600 it, or make a new key"):
            read()
        secret.chmod(0o600)


def test_a_key_file_holds_all_that_its_holder_needs(folder, tmp_path):
    made = folder.new("laptop", "reader")
    made.write(tmp_path / "k")
    assert ClientKey.read(tmp_path / "k") == made
    # For a reader's eyes: one line for each part.
    assert (tmp_path / "k").read_text() == json.dumps(asdict(made), indent=2) + "\n"
    assert made.learner == folder.learner()[0]
    assert {public: (entry.name, entry.role) for public, entry in folder.listed().items()} == {
        made.public: ("laptop", "reader")
    }


@pytest.mark.parametrize("part", ["public", "secret", "learner"])
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (lambda key: key[1:], "its keys must have 40 characters; copy the file again"),
        (lambda key: f"{key}x", "its keys must have 40 characters"),
        (lambda _: [0] * 40, "is no key file"),
    ],
    ids=["cut", "longer", "no text"],
)
def test_a_key_file_that_was_copied_badly_is_refused(folder, tmp_path, part, changed, why):
    path = tmp_path / "k"
    folder.new("laptop", "worker").write(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {part: changed(content[part])}))
    with pytest.raises(RunError, match=why):
        ClientKey.read(path)


def test_the_learners_key_stays_the_same(folder):
    assert folder.learner() == KeyFolder(folder.folder).learner()


def test_a_name_is_listed_once_until_it_is_revoked(folder):
    first = folder.new("laptop", "worker")
    with pytest.raises(RunError, match="laptop: a key of this name is listed"):
        folder.new("laptop", "reader")
    folder.revoke("laptop")
    assert folder.listed() == {}
    assert folder.new("laptop", "worker").public != first.public
    with pytest.raises(RunError, match="tablet: no key of this name is listed"):
        folder.revoke("tablet")


def test_keys_that_are_made_at_the_same_time_are_all_let_in(folder):
    makers = [
        threading.Thread(target=lambda who=who: [folder.new(f"{who}{n}", "worker") for n in range(8)])
        for who in "ab"
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(folder.listed()) == 16


def test_a_revocation_is_on_the_disk_when_it_is_told(folder, monkeypatch):
    folder.new("laptop", "worker")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    folder.revoke("laptop")
    assert (folder.folder / "allowed.json").stat().st_ino in synced


def test_a_list_that_cannot_be_reached_is_no_empty_one(folder):
    folder.new("laptop", "worker")
    path = folder.folder / "allowed.json"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(RunError, match=r"allowed\.json: cannot be read"):
        folder.listed()


@pytest.mark.parametrize("name", ["learner.json", "allowed.json"])
def test_a_check_makes_no_file_and_refuses_one_that_is_damaged(folder, name):
    folder.check()
    assert not folder.folder.exists()
    folder.new("laptop", "worker")
    folder.check()
    (folder.folder / name).write_text("{")
    with pytest.raises(RunError, match=name):
        folder.check()


def test_a_draft_that_a_killed_process_left_open_to_others_is_not_written_to(folder):
    folder.learner()
    with (folder.folder / "allowed.json.tmp").open("w") as left:
        folder.new("laptop", "worker")
        assert os.fstat(left.fileno()).st_size == 0
    assert len(folder.listed()) == 1


def test_the_folder_is_made_with_those_above_it(tmp_path):
    assert KeyFolder(tmp_path / "a" / "b").learner()


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"name": 1}', '{"public": "x"}'], ids=repr)
def test_what_is_no_key_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "k"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(RunError, match="k: is no key file; make one with"):
        ClientKey.read(path)


def test_a_damaged_list_is_refused_in_one_line(folder):
    folder.new("laptop", "worker")
    path = folder.folder / "allowed.json"
    path.write_text('{"x": 3}')
    with pytest.raises(RunError, match=r"allowed\.json: is damaged"):
        folder.listed()


@pytest.mark.parametrize("content", ["{}", '{"secret": 3}', '{"secret": "short"}'])
def test_a_damaged_key_of_the_learner_is_refused_in_one_line(folder, content):
    folder.learner()
    (folder.folder / "learner.json").write_text(content)
    with pytest.raises(RunError, match=r"learner\.json: is damaged; remove it"):
        folder.learner()


def test_a_folder_that_cannot_be_written_names_the_setting():
    with pytest.raises(RunError, match=r"cannot be written .* set transport\.keys_dir"):
        KeyFolder(Path("/proc/nothing")).learner()


def test_a_runs_key_lives_as_long_as_the_run(folder, run_dir):
    with run_key(run_dir, folder):
        key = read_run_key(run_dir)
        assert (key.role, key.learner) == ("run", folder.learner()[0])
        assert (run_dir / "run.key").stat().st_mode & 0o777 == 0o600
    assert read_run_key(run_dir) is None
    (run_dir / "run.key").write_text("left by a killed run")
    with run_key(run_dir, None):
        assert read_run_key(run_dir) is None


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; return what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["keys", "--keys-dir", str(tmp_path / "keys"), *arguments])
        assert main() == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return run


def test_the_command_makes_lists_and_revokes(tmp_path, command):
    assert command("new", "laptop", "--role", "reader") == (
        "laptop.key: give it to laptop only, and keep it at mode 600 there. It lets its holder in as reader.\n"
    )
    public = ClientKey.read(tmp_path / "laptop.key").public
    since = KeyFolder(tmp_path / "keys").listed()[public].since
    assert command("list").split() == ["laptop", "reader", "since", since, public]
    with pytest.raises(RunError, match=r"laptop\.key: is there already; choose another --output"):
        command("new", "laptop")
    assert command("revoke", "laptop") == "laptop is let in no more\n"
    assert command("list") == ""


def test_a_key_is_a_workers_and_goes_where_its_user_says(tmp_path, command):
    assert command("new", "x" * 100, "--output", "given").endswith("It lets its holder in as worker.\n")
    assert ClientKey.read(tmp_path / "given").role == "worker"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "keys"]


@pytest.mark.parametrize("name", ["", "x" * 101, "a\nb", "../laptop", ".hidden"], ids=repr)
def test_a_name_is_short_printable_and_no_path(tmp_path, command, name):
    with pytest.raises(RunError) as caught:
        command("new", name)
    assert str(caught.value) == (
        f"NAME must have 1 to 100 printable characters and no slash, got {name[:40]!r}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_cannot_be_written_is_not_let_in(tmp_path, command):
    with pytest.raises(RunError, match="absent: is no folder; choose another --output"):
        command("new", "laptop", "--output", "absent/key")
    with pytest.raises(RunError, match="kkk: File name too long"):
        command("new", "laptop", "--output", "k" * 300)
    with pytest.raises(RunError, match=r"^/proc/key: cannot be written \(.*\); choose another --output"):
        command("new", "laptop", "--output", "/proc/key")
    assert command("list") == ""


@pytest.mark.parametrize(
    "arguments", [[], ["new"], ["revoke"], ["new", "x", "--role", "king"], ["make", "x"]]
)
def test_a_command_line_without_a_meaning_is_refused(command, arguments):
    with pytest.raises(SystemExit) as left:
        command(*arguments)
    assert left.value.code == 2
