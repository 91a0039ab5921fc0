"""Checkpoints as files, without a model."""

import hashlib
import json
import os
import sys

import pytest
from checkpoint_files import STATE as WHOLE_STATE
from scores import score
from small_disk import small_disk

from grpo_actors.errors import RunError
from grpo_actors.rundir.checkpoints import (
    Best,
    Checkpoint,
    best,
    best_checkpoint,
    find_checkpoints,
    mark_best,
    newest_sound,
    prune,
    put_aside,
    read_state,
    remove_unfinished,
    seal,
    verify,
)
from grpo_actors.rundir.folder import BEST, MANIFEST, STATE

#: The file of the weights, and a shard of the optimizer's state.
WEIGHTS, SHARD = "adapters.safetensors", "optimizer-0000{}-of-00002.safetensors"


def write(run_dir, update):
    temporary = run_dir / f"checkpoint-{update}.tmp"
    temporary.mkdir()
    (temporary / STATE).write_text(json.dumps(WHOLE_STATE | {"update": update}))
    for name in (WEIGHTS, SHARD.format(1), SHARD.format(2)):
        (temporary / name).write_bytes(bytes(range(256)))
    seal(temporary, run_dir / f"checkpoint-{update}")
    return run_dir / f"checkpoint-{update}"


def updates(run_dir):
    return [checkpoint.update for checkpoint in find_checkpoints(run_dir)]


def test_checkpoints_are_found_in_the_order_of_their_numbers(run_dir):
    for update in (10, 9, 100):
        write(run_dir, update)
    for stray in ("checkpoint-3.tmp", "checkpoint-x", "checkpoint-²", "checkpoint-7", "5"):
        (run_dir / stray).mkdir()
        if stray != "checkpoint-7":
            (run_dir / stray / MANIFEST).touch()
    assert updates(run_dir) == [9, 10, 100]
    newest, faults = newest_sound(run_dir)
    assert newest is not None
    assert (read_state(newest).update, faults) == (100, [])
    assert newest.bytes == sum(path.stat().st_size for path in newest.path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="a file of which every read fails")
def test_a_file_that_cannot_be_read_is_a_fault_of_its_checkpoint(run_dir):
    folder = write(run_dir, 1)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/proc/self/mem")
    assert newest_sound(run_dir) == (None, [f"{folder}: cannot be read (Input/output error)"])


def test_an_empty_run_folder_has_none(run_dir):
    assert newest_sound(run_dir) == (None, [])
    assert newest_sound(run_dir / "absent") == (None, [])


def test_each_damaged_checkpoint_is_reported_and_the_next_older_one_is_used(run_dir):
    for update in (1, 2, 3):
        write(run_dir, update)
    (run_dir / "checkpoint-3" / WEIGHTS).unlink()
    (run_dir / "checkpoint-2" / WEIGHTS).write_bytes(bytes(256))
    newest, faults = newest_sound(run_dir)
    assert newest is not None
    assert newest.update == 1
    assert ["checkpoint-3" in faults[0], f"checkpoint-2/{WEIGHTS}" in faults[1]] == [True, True]


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        '{"files": []}',
        '{"files": {}}',
        '{"files": 3}',
        '{"file": {}}',
        "\udcff",
        '{"files": {"state.json": null}}',
        '{"files": {"state.json": {}, "../x": 1}}',
    ],
)
def test_a_manifest_of_any_other_shape_does_not_verify(run_dir, manifest):
    write(run_dir, 1)
    (run_dir / "checkpoint-1" / MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    assert verify(find_checkpoints(run_dir)[0]) is not None


@pytest.mark.parametrize(
    ("unlisted", "fault"),
    [
        ([STATE], "manifest.json: lists no state.json"),
        ([WEIGHTS], "manifest.json: lists no weights"),
        ([SHARD.format(1), SHARD.format(2)], "manifest.json: lists no optimizer"),
        ([SHARD.format(2)], "manifest.json: does not list all 2 files of optimizer"),
    ],
)
def test_a_manifest_that_lists_less_than_a_checkpoint_has_does_not_verify(run_dir, unlisted, fault):
    """Otherwise weights changed by hand would pass, if their entry is removed with them."""
    manifest = write(run_dir, 1) / MANIFEST
    files = json.loads(manifest.read_text())["files"]
    for name in unlisted:
        del files[name]
    manifest.write_text(json.dumps({"files": files}))
    assert fault in str(verify(find_checkpoints(run_dir)[0]))


def test_a_manifest_that_lists_only_the_state_does_not_verify(run_dir):
    folder = write(run_dir, 1)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    (folder / MANIFEST).write_text(json.dumps({"files": {STATE: files[STATE]}}))
    assert "lists no weights" in str(verify(find_checkpoints(run_dir)[0]))


def test_a_file_that_the_manifest_does_not_list_spoils_a_checkpoint(run_dir):
    """A loader of the folder would read it: more weights, another chat template, code."""
    folder = write(run_dir, 1)
    (folder / "model.safetensors").write_bytes(b"")
    fault = verify(find_checkpoints(run_dir)[0])
    cure = "its manifest.json does not list it; move it out of the checkpoint"
    assert fault == f"{folder / 'model.safetensors'}: {cure}"


def test_a_score_and_hidden_files_do_not_spoil_a_checkpoint(run_dir):
    folder = write(run_dir, 1)
    (folder / ".cache").mkdir()
    for name in ("evaluation.json", "evaluation.json.tmp", ".DS_Store", ".cache/index"):
        (folder / name).write_text("{}")
    assert verify(find_checkpoints(run_dir)[0], to_resume=True) is None


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({key: value for key, value in WHOLE_STATE.items() if key != "cursor"}, "cursor: Field required"),
        (WHOLE_STATE | {"update": 2}, "update must be 1, got 2"),
        (WHOLE_STATE | {"records": "4"}, "records: Input should be a valid integer"),
        (WHOLE_STATE | {"skipped_steps": -1}, "skipped_steps: Input should be greater than or equal to 0"),
        (WHOLE_STATE | {"cursor": {"position": 0, "set_aside": 3}}, "cursor.set_aside"),
        ([], "Input should be an object"),
    ],
)
def test_a_state_from_which_no_run_can_continue_is_found_before_one_does(run_dir, state, fault):
    """Its digest may be right: somebody has edited both files."""
    folder = write(run_dir, 1)
    content = json.dumps({"update": 1} | state if isinstance(state, dict) else state).encode()
    (folder / STATE).write_bytes(content)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    files[STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    newest, [found] = newest_sound(run_dir)
    assert newest is None
    assert found.startswith(f"{folder / STATE}: ")
    assert fault in found
    assert "\n" not in found


def test_a_checkpoint_can_be_put_aside_under_the_same_number_again_and_again(run_dir):
    names = [put_aside(write(run_dir, 4)).name for _ in range(3)]
    assert names == ["checkpoint-4.damaged", "checkpoint-4.damaged-2", "checkpoint-4.damaged-3"]
    assert updates(run_dir) == []


def test_prune_keeps_the_newest_the_best_and_those_not_yet_evaluated(run_dir):
    for update in range(1, 9):
        write(run_dir, update)
    mark_best(run_dir, 2, score(0.5))
    prune(run_dir, 3, frozenset({4}))
    assert updates(run_dir) == [2, 4, 6, 7, 8]
    mark_best(run_dir, 7, score(0.6))
    prune(run_dir, 1, frozenset())
    assert updates(run_dir) == [7, 8]


def test_what_a_kill_left_unfinished_is_removed(run_dir):
    write(run_dir, 1)
    for name in ("checkpoint-2.tmp", "checkpoint-0.old.tmp"):
        (run_dir / name).mkdir()
        (run_dir / name / "weights").write_text("x")
    prune(run_dir, 1, frozenset())
    assert len(list(run_dir.iterdir())) == 3, "one may be being written"
    remove_unfinished(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-1"]


def test_a_removal_that_fails_ends_no_run_and_leaves_no_checkpoint_that_looks_whole(run_dir):
    for update in (1, 2, 3):
        write(run_dir, update)
    held = run_dir / "checkpoint-1" / "held"
    held.mkdir()
    with small_disk(held, 1):  # what is mounted cannot be removed
        prune(run_dir, 1, frozenset())
        assert updates(run_dir) == [3]
        remove_unfinished(run_dir)
        assert [path.name for path in run_dir.iterdir() if path.suffix] == ["checkpoint-1.old.tmp"]
    remove_unfinished(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-3"]


def test_the_best_is_recorded_on_the_disk_and_there_is_none_before(run_dir, monkeypatch):
    assert best(run_dir) is None
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    mark_best(run_dir, 4, score(0.25))
    assert synced == [(run_dir / BEST).stat().st_ino]
    assert best(run_dir) == Best("checkpoint-4", 4, score(0.25))
    assert [path.name for path in run_dir.iterdir()] == [BEST]


def test_the_best_checkpoint_is_the_marked_one_or_none_if_none_beat_the_base(run_dir, caplog):
    assert best_checkpoint(run_dir) is None
    write(run_dir, 4)
    mark_best(run_dir, 0, score(0.5))
    assert best(run_dir) == Best("base", 0, score(0.5))
    assert not caplog.records
    assert best_checkpoint(run_dir) is None
    [warning] = caplog.messages
    assert (
        warning
        == f"{run_dir}: no checkpoint beat the base model ({score(0.5).measure}: {score(0.5)}); the newest is used"
    )
    mark_best(run_dir, 4, score(0.6))
    assert best_checkpoint(run_dir) == Checkpoint(run_dir / "checkpoint-4", 4)


def test_a_digest_that_was_computed_while_a_file_was_written_is_not_computed_again(run_dir):
    draft = run_dir / "draft"
    draft.mkdir()
    for name in ("b", "a"):
        (draft / name).write_text(name)
    known = {"bytes": 7, "sha256": "0" * 64}
    seal(draft, run_dir / "checkpoint-1", {"b": known})
    listed = json.loads((run_dir / "checkpoint-1" / MANIFEST).read_text())["files"]
    assert list(listed.items()) == [
        ("a", {"bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()}),
        ("b", known),
    ]


def mark(checkpoint, update):
    fields = {"checkpoint": checkpoint, "update": update, "score": score(0.5).model_dump()}
    return json.dumps(fields)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"checkpoint": "checkpoint-1", "update": 1}',
        mark("../other/checkpoint-1", 1),
        mark("/etc", 1),
        mark("checkpoint-1", 2),
        mark("checkpoint-0", 0),
        mark("checkpoint--1", -1),
        mark("base", 1),
        mark("checkpoint-1", 1).replace("0.5", "NaN"),
        mark("checkpoint-1", "1"),
        '{"checkpoint": "checkpoint-1", "update": 1, "accuracy": 0.5}',
    ],
)
def test_an_unusable_mark_of_the_best_is_one_line_and_stops_a_prune(run_dir, content):
    write(run_dir, 1)
    write(run_dir, 2)
    (run_dir / BEST).write_text(content)
    with pytest.raises(RunError) as caught:
        prune(run_dir, 1, frozenset())
    assert str(caught.value).startswith(f"{run_dir / BEST}: ")
    assert str(caught.value).endswith("; remove it to let the next evaluation mark the best")
    assert "\n" not in str(caught.value)
    assert updates(run_dir) == [1, 2]
