"""Files and folders are complete or absent, and what a user has is replaced only where that was asked for."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from grpo_actors import atomic, failpoints
from grpo_actors.atomic import (
    FULL_BYTES,
    PRIVATE_FOLDER,
    discard_folder,
    draft_of,
    new_file,
    new_folder,
    seal_folder,
    whole_file,
    write_contents,
    write_fault,
    write_whole,
)
from grpo_actors.errors import ModelError


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("_json", ".json")).write_text(text)
    return path


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture
def synced(monkeypatch) -> list[int]:
    """The inodes of files and folders that are made to reach the disk, in order."""
    seen: list[int] = []
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_ino))
    return seen


def failing(draft: Path) -> None:
    (draft / "new" if draft.is_dir() else draft).write_text("new")
    raise ZeroDivisionError


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_has_its_old_content_until_the_new_one_is_whole(tmp_path, durable):
    target = tmp_path / "file"
    target.write_text("old")
    with whole_file(target, durable=durable) as draft:
        draft.write_text("ne")
        assert target.read_text() == "old"
        assert draft == tmp_path / "file.tmp" == draft_of(target)
        draft.write_text("new")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_file_that_fails_keeps_its_old_content_and_leaves_no_draft(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(target) as draft:
        failing(draft)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_only_a_durable_file_waits_for_the_disk(tmp_path, synced):
    with whole_file(tmp_path / "draft") as draft:
        draft.touch()
    write_whole(tmp_path / "file", "text")
    assert synced == []
    write_whole(tmp_path / "file", "text", durable=True)
    assert synced == [inode(tmp_path / "file")]


def test_only_its_user_reads_a_file_written_whole(tmp_path):
    before = os.umask(0o000)
    try:
        write_whole(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "file").read_text() == "text"


def test_files_by_their_names_go_into_subfolders_too(tmp_path):
    write_contents(tmp_path, {"a": b"1", "sub/b": b"2", "sub/c": b"3"})
    assert names(tmp_path) == ["a", "sub", "sub/b", "sub/c"]
    assert (tmp_path / "sub" / "b").read_bytes() == b"2"


# --- folders -----------------------------------------------------------------------------------------


def test_a_sealed_folder_and_all_in_it_are_on_the_disk_and_replace_the_old_one(tmp_path, synced):
    target, draft = folder_with(tmp_path / "target", old="1"), folder_with(tmp_path / "target.tmp", new="2")
    (draft / "sub").mkdir()
    (draft / "sub" / "file").write_text("3")
    opened = len(list(Path("/dev/fd").iterdir()))
    seal_folder(draft, target)
    assert len(list(Path("/dev/fd").iterdir())) == opened
    assert names(tmp_path) == ["target", "target/new", "target/sub", "target/sub/file"]
    assert sorted(synced[:-2]) == sorted(map(inode, target.rglob("*")))
    assert synced[-2:] == [inode(target), inode(tmp_path)], "after what is in it; its new name comes last"


def test_a_discarded_folder_is_gone_also_if_one_was_half_removed_before(tmp_path):
    folder_with(tmp_path / "target.old.tmp", left="by a kill")
    discard_folder(folder_with(tmp_path / "target", file="1"))
    assert names(tmp_path) == []


def test_a_folder_whose_removal_is_cut_has_lost_its_name_before(tmp_path, monkeypatch):
    monkeypatch.setattr(failpoints, "_FOLDER", str(tmp_path))
    (tmp_path / "folder.discarded").write_text("full")
    with pytest.raises(OSError, match="No space left"):
        discard_folder(folder_with(tmp_path / "target", file="1"))
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "target.old.tmp" / "file").exists()


def test_a_folder_that_somebody_else_clears_away_meanwhile_is_discarded(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "reach", lambda _: shutil.rmtree(tmp_path / "target.old.tmp"))
    discard_folder(folder_with(tmp_path / "target", file="1"))
    assert names(tmp_path) == []


def test_a_private_folder_is_its_users_and_open_to_them(tmp_path):
    (tmp_path / "own").mkdir(PRIVATE_FOLDER)
    assert (tmp_path / "own").stat().st_mode & 0o777 == stat.S_IRWXU


# --- what a user asked for ---------------------------------------------------------------------------


def test_a_file_of_a_user_is_replaced_only_with_overwrite(tmp_path):
    target = tmp_path / "new" / "folder" / "model.gguf"
    with new_file(target, overwrite=False, option="--gguf") as draft:
        draft.write_text("1")
    with (
        pytest.raises(
            ModelError, match=r"model\.gguf: the file is there; add --overwrite or choose another --gguf"
        ),
        new_file(target, overwrite=False, option="--gguf"),
    ):
        pytest.fail("it began")
    with new_file(target, overwrite=True, option="--gguf") as draft:
        draft.write_text("2")
    assert target.read_text() == "2"
    with (
        pytest.raises(ModelError, match="folder: --gguf must be a file, got a folder"),
        new_file(target.parent, overwrite=True, option="--gguf"),
    ):
        pytest.fail("it began")


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ModelError, match=r"file/x: cannot be written: (Not a directory|File exists)$"),
        new_file(tmp_path / "file" / "x", overwrite=False, option="--gguf"),
    ):
        pytest.fail("it began")
    with (
        pytest.raises(ModelError, match=r"x\.tmp: cannot be made: .*; choose another --fuse$"),
        fuse(tmp_path / "file" / "x"),
    ):
        pytest.fail("it began")
    with pytest.raises(ModelError, match=r"target: cannot be written: no number$"), fuse(tmp_path / "target"):
        raise OSError("no number")
    assert names(tmp_path) == ["file"]


def fuse(target: Path, *, overwrite: bool = False):
    return new_folder(
        target, overwrite=overwrite, option="--fuse", precious=("checkpoint-*", "metrics.jsonl")
    )


@pytest.mark.parametrize("before", ["absent", "empty", "model", "adapter"])
def test_a_new_folder_takes_the_place_of_none_an_empty_one_or_a_model_with_overwrite(tmp_path, before):
    target = tmp_path / "a" / "target"
    if before == "empty":
        target.mkdir(parents=True)
    elif before != "absent":
        folder_with(target, **{"config_json" if before == "model" else "adapter_config_json": "{}"}, old="1")
    with fuse(target, overwrite=before in ("model", "adapter")) as draft:
        (draft / "new").write_text("2")
        assert not (target / "new").exists()
    assert names(tmp_path) == ["a", "a/target", "a/target/new"]


@pytest.mark.parametrize(
    ("files", "overwrite", "refusal"),
    [
        ({"config_json": "{}"}, False, "the folder is not empty; add --overwrite or choose another --fuse"),
        ({"thesis": "…"}, True, "--overwrite replaces model folders only, and this one has no config.json"),
        (
            {"config_json": "{}", "checkpoint-3": ""},
            True,
            "--overwrite replaces model folders only, and this is a run's; choose another --fuse",
        ),
    ],
    ids=["not asked", "no model", "a run"],
)
def test_a_folder_that_may_not_be_replaced_stays_as_it_is(tmp_path, files, overwrite, refusal):
    target = folder_with(tmp_path / "target", **files)
    before = names(tmp_path)
    with pytest.raises(ModelError) as caught, fuse(target, overwrite=overwrite):
        pytest.fail("it began")
    assert str(caught.value) == f"{target}: {refusal}"
    assert names(tmp_path) == before


def test_a_file_and_a_path_without_a_name_are_no_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ModelError, match="file: --fuse must be a folder, got a file"),
        fuse(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("it began")
    with pytest.raises(ModelError, match="--fuse must name a folder to make, got /"), fuse(Path("/")):
        pytest.fail("it began")


def test_what_another_tool_left_is_named_and_not_deleted(tmp_path):
    draft = folder_with(tmp_path / "target.tmp", half="1")
    with (
        pytest.raises(ModelError, match=r"target\.tmp: another tool is writing it"),
        fuse(tmp_path / "target"),
    ):
        pytest.fail("it began")
    assert names(draft) == ["half"]
    draft.rename(tmp_path / "target.old")
    folder_with(tmp_path / "target", config_json="{}")
    with (
        pytest.raises(
            ModelError, match=r"target\.old: left by a tool that was killed; move it back to .*target"
        ),
        fuse(tmp_path / "target", overwrite=True),
    ):
        pytest.fail("it began")
    assert names(tmp_path / "target.old") == ["half"]


def test_a_new_folder_that_fails_leaves_the_old_one_and_no_draft(tmp_path):
    target = folder_with(tmp_path / "target", config_json="{}")
    with pytest.raises(ZeroDivisionError), fuse(target, overwrite=True) as draft:
        failing(draft)
    assert names(tmp_path) == ["target", "target/config.json"]


def test_a_new_folder_that_does_not_get_its_name_gives_the_old_one_back(tmp_path):
    target = folder_with(tmp_path / "target", config_json="{}")
    with (
        pytest.raises(ModelError, match="cannot be written: No such file") as caught,
        fuse(target, overwrite=True) as draft,
    ):
        draft.rmdir()  # somebody cleans up
    assert caught.value.__cause__.filename == str(draft), "the first fault, not one that follows from it"
    assert names(tmp_path) == ["target", "target/config.json"]


# --- faults ------------------------------------------------------------------------------------------


def test_a_full_disk_has_a_cure_and_another_fault_has_not(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT):
        text = os.strerror(number)
        assert write_fault(OSError(number, text), tmp_path) == f"{text}; free space on this disk"
    assert write_fault(PermissionError(errno.EACCES, "Permission denied"), tmp_path) == "Permission denied"
    assert write_fault(OSError("odd\nmore"), tmp_path) == "odd"


@pytest.mark.parametrize(
    ("free", "cure"),
    [(0, "; free space on this disk"), (FULL_BYTES - 1, "; free space on this disk"), (FULL_BYTES, "")],
)
def test_an_error_without_a_number_is_explained_by_what_the_disk_has_left(tmp_path, monkeypatch, free, cure):
    usage = atomic.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    assert write_fault(RuntimeError("[save] failed\nat"), tmp_path) == f"[save] failed{cure}"
