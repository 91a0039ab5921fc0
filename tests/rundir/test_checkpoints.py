"""Checkpoints as files, without a model."""

import json

import pytest
from small_disk import small_disk

from grpo_actors.errors import RunError
from grpo_actors.rundir.checkpoints import (
    best,
    find_checkpoints,
    mark_best,
    newest_sound,
    prune,
    read_state,
    remove_unfinished,
    seal,
    verify,
)
from grpo_actors.rundir.folder import BEST, MANIFEST, STATE


def write(run_dir, update):
    temporary = run_dir / f"checkpoint-{update}.tmp"
    temporary.mkdir()
    (temporary / STATE).write_text(json.dumps({"update": update}))
    (temporary / "weights").write_bytes(bytes(range(256)))
    seal(temporary, run_dir / f"checkpoint-{update}")


def updates(run_dir):
    return [checkpoint.update for checkpoint in find_checkpoints(run_dir)]


def test_checkpoints_are_found_in_the_order_of_their_numbers(run_dir):
    for update in (10, 9, 100):
        write(run_dir, update)
    for stray in ("checkpoint-3.tmp", "checkpoint-x", "checkpoint-7", "other-5"):  # 7 has no manifest
        (run_dir / stray).mkdir()
    assert updates(run_dir) == [9, 10, 100]
    newest, faults = newest_sound(run_dir)
    assert newest is not None
    assert (read_state(newest), faults) == ({"update": 100}, [])
    assert newest.bytes == sum(path.stat().st_size for path in newest.path.iterdir())


def test_an_empty_run_folder_has_none(run_dir):
    assert newest_sound(run_dir) == (None, [])
    assert newest_sound(run_dir / "absent") == (None, [])


def test_each_damaged_checkpoint_is_reported_and_the_next_older_one_is_used(run_dir):
    for update in (1, 2, 3):
        write(run_dir, update)
    (run_dir / "checkpoint-3/weights").unlink()
    (run_dir / "checkpoint-2/weights").write_bytes(bytes(256))
    newest, faults = newest_sound(run_dir)
    assert newest is not None
    assert newest.update == 1
    assert ["checkpoint-3" in faults[0], "checkpoint-2/weights" in faults[1]] == [True, True]


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


def test_a_file_added_later_does_not_spoil_a_checkpoint(run_dir):
    write(run_dir, 1)
    (run_dir / "checkpoint-1/evaluation.json").write_text("{}")
    assert verify(find_checkpoints(run_dir)[0]) is None


def test_prune_keeps_the_newest_the_best_and_those_not_yet_evaluated(run_dir):
    for update in range(1, 9):
        write(run_dir, update)
    mark_best(run_dir, 2, 0.5)
    prune(run_dir, 3, frozenset({4}))
    assert updates(run_dir) == [2, 4, 6, 7, 8]
    mark_best(run_dir, 7, 0.6)
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


def test_the_best_is_recorded_and_there_is_none_before(run_dir):
    assert best(run_dir) is None
    mark_best(run_dir, 4, 0.25)
    assert best(run_dir) == {"checkpoint": "checkpoint-4", "update": 4, "accuracy": 0.25}
    assert [path.name for path in run_dir.iterdir()] == [BEST]


def test_an_unreadable_mark_of_the_best_stops_a_prune(run_dir):
    write(run_dir, 1)
    write(run_dir, 2)
    (run_dir / BEST).write_text("")
    with pytest.raises(RunError, match=r"best\.json"):
        prune(run_dir, 1, frozenset())
    assert updates(run_dir) == [1, 2]
