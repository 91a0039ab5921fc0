"""Checkpoints written while training goes on: what they contain, when they count, and how an error surfaces."""

import contextlib
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, fields

import mlx.core as mx
import pytest
from bounds import HANG_S
from checkpoint_files import STATE
from hand_made import RecordList, assert_same_weights, config, groups_of, learner, weights
from host_copies import HostCopy
from scores import report

from grpo_actors.errors import RunError
from grpo_actors.learner.archive import Archive
from grpo_actors.learner.checkpointing import CheckpointWriter, has_room
from grpo_actors.rundir.checkpoint_weights import FrozenCheckpoint, freeze_checkpoint
from grpo_actors.rundir.checkpoints import find_checkpoints, read_state, verify
from grpo_actors.rundir.snapshot import reserve
from grpo_actors.wire.messages import Evaluation


@pytest.fixture
def opened(tmp_path):
    """Return a new run's archive, learner and records; nothing evaluates its checkpoints."""
    settings = config(run={"keep_checkpoints": 1})
    unevaluated = settings.evaluator.model_copy(update={"eval_every_updates": 0})
    archive = Archive(tmp_path, settings.model_copy(update={"evaluator": unevaluated}), "run")
    with contextlib.closing(archive):
        yield archive, learner(settings), RecordList()


def test_a_frozen_checkpoint_keeps_its_moment_while_training_goes_on(tmp_path):
    settings = config()
    grpo = learner(settings)
    groups = groups_of(grpo.policy)
    grpo.update(groups)
    frozen = freeze_checkpoint(1, grpo.policy, grpo.training, STATE)
    for _ in range(2):
        grpo.update(groups)
    frozen.write(tmp_path)

    resumed = learner(settings)
    Archive(tmp_path, settings, "run").restore(resumed)
    assert resumed.version == 1
    for _ in range(2):
        resumed.update(groups)
    for name, array in (grpo.policy.trainable() | grpo.training.state()).items():
        assert mx.array_equal(array, (resumed.policy.trainable() | resumed.training.state())[name]), name


def test_a_checkpoint_is_recorded_and_replaces_older_ones_once_it_is_durable(opened, tmp_path):
    archive, grpo, records = opened
    for update in (1, 2, 3):
        grpo.version = update
        records.record("metrics", update=update)
        archive.save(records, grpo)
        # One at a time: the one before is durable, recorded, and the only one that counts.
        assert records.updates("checkpoint") == list(range(1, update))
    archive.collect(records, wait=True)
    assert records.updates("checkpoint") == [1, 2, 3]
    archive.save(records, grpo)
    assert records.updates("checkpoint") == [1, 2, 3], "this version has one"
    archive.close()  # old ones are removed by then
    (kept,) = find_checkpoints(tmp_path)
    assert verify(kept, to_resume=True) is None
    # Three metrics, and the records of the two checkpoints before: a resumed run repeats what came later.
    assert (kept.update, read_state(kept).records) == (3, 5)


def test_a_score_comes_after_the_record_of_its_checkpoint(opened):
    archive, grpo, records = opened
    grpo.version = 1
    archive.save(records, grpo)
    arrived = Evaluation(update=1, checkpoint="checkpoint-1", report=report())
    archive.take_evaluations(records, [arrived])
    assert [topic for topic, _ in records.records] == ["checkpoint", "eval"]


def repeat(call, seconds=10):
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        call()


@pytest.mark.parametrize("next_call", ["collect", "save", "take_evaluations"])
def test_an_error_in_the_background_surfaces_at_the_next_call(opened, tmp_path, next_call):
    archive, grpo, records = opened
    grpo.version = 1
    (tmp_path / "checkpoint-1.tmp").write_text("a file where the checkpoint's folder should be made")
    archive.save(records, grpo)
    grpo.version = 2
    calls = {
        "collect": lambda: archive.collect(records),
        "save": lambda: archive.save(records, grpo),
        "take_evaluations": lambda: archive.take_evaluations(records, []),
    }
    with pytest.raises(RunError, match=r"checkpoint-1: cannot be written: File exists$"):
        repeat(calls[next_call])
    assert records.records == []
    assert find_checkpoints(tmp_path) == []


def test_an_error_that_nobody_collected_is_printed_at_the_end(opened, tmp_path, capsys):
    archive, grpo, records = opened
    grpo.version = 1
    (tmp_path / "checkpoint-1.tmp").write_text("in the way")
    archive.save(records, grpo)
    archive.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "checkpoint-1: cannot be written" in line


def test_closing_finishes_the_checkpoint_under_way(opened, tmp_path):
    archive, grpo, records = opened
    grpo.version = 1
    archive.save(records, grpo)
    archive.close()
    (kept,) = find_checkpoints(tmp_path)
    assert verify(kept, to_resume=True) is None


@contextlib.contextmanager
def memory_limit(size):
    before = mx.set_memory_limit(size)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def test_training_waits_where_the_memory_has_no_room_for_the_arrays_twice(tmp_path):
    grpo = learner(config())
    frozen = freeze_checkpoint(1, grpo.policy, grpo.training, STATE)
    # 0.7 M float32 weights and AdamW's two moments of each, 8.4 MB.
    assert frozen.bytes == sum(a.nbytes for a in (grpo.policy.trainable() | grpo.training.state()).values())
    with memory_limit(mx.get_peak_memory() + frozen.bytes):
        assert has_room(frozen.bytes)
        assert not has_room(frozen.bytes + 1)
    with contextlib.closing(CheckpointWriter(tmp_path)) as writer:
        assert not writer.reserves_memory
        with memory_limit(mx.get_peak_memory()):
            written = writer.start(frozen)
            assert written.done()
        assert 0 < written.result().seconds < HANG_S
        # The first decision holds: the peak after it may include a checkpoint.
        assert writer.start(freeze_checkpoint(2, grpo.policy, grpo.training, STATE)).done()
    assert [checkpoint.update for checkpoint in find_checkpoints(tmp_path)] == [1, 2]
    assert_same_weights(weights(grpo), dict(mx.load(str(tmp_path / "checkpoint-1" / "model.safetensors"))))


@dataclass(frozen=True)
class Slow(FrozenCheckpoint):
    """Is written as soon as `may_go_on` is set."""

    may_go_on: threading.Event

    def write(self, run_dir):
        assert self.may_go_on.wait(HANG_S)
        return super().write(run_dir)


def slowly(frozen, may_go_on):
    return Slow(**{each.name: getattr(frozen, each.name) for each in fields(frozen)}, may_go_on=may_go_on)


@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_beside_a_checkpoint_for_which_the_plan_has_room(tmp_path, monkeypatch, fails):
    grpo, may_go_on = learner(config()), threading.Event()
    frozen = freeze_checkpoint(1, grpo.policy, grpo.training, STATE)
    slow = slowly(frozen, may_go_on)
    if fails:
        (tmp_path / "checkpoint-1.tmp").write_text("in the way")
    monkeypatch.setenv("GRPO_ACTORS_CHECKPOINT_ROOM", str(slow.bytes))
    # The peak leaves no room: MLX computes as far ahead as its limit allows.
    limit = mx.get_peak_memory()
    with memory_limit(limit), contextlib.closing(CheckpointWriter(tmp_path)) as writer:
        written = writer.start(slow)
        assert not written.done()
        assert mx.get_memory_limit() == limit + slow.bytes
        may_go_on.set()
        assert (written.exception(60) is not None) == fails
        assert mx.get_memory_limit() == limit


def test_checkpoints_are_written_one_after_the_other(tmp_path, monkeypatch):
    grpo, may_go_on = learner(config()), threading.Event()
    frozen = freeze_checkpoint(1, grpo.policy, grpo.training, STATE)
    monkeypatch.setenv("GRPO_ACTORS_CHECKPOINT_ROOM", str(frozen.bytes))

    class Next(FrozenCheckpoint):
        def write(self, run_dir):
            assert first.done()
            return super().write(run_dir)

    following = freeze_checkpoint(2, grpo.policy, grpo.training, STATE)
    with contextlib.closing(CheckpointWriter(tmp_path)) as writer:
        first = writer.start(slowly(frozen, may_go_on))
        second = writer.start(
            Next(**{each.name: getattr(following, each.name) for each in fields(following)})
        )
        may_go_on.set()
        assert second.result(HANG_S).checkpoint.update == 2


class Unremovable(frozenset):
    """Updates to keep, on which a removal fails."""

    def __or__(self, other):
        raise RunError("checkpoint-1: cannot be removed")


def test_an_earlier_removal_that_failed_is_raised_once(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.prune(1, Unremovable())
    with pytest.raises(RunError, match="cannot be removed"):
        repeat(lambda: writer.prune(1, frozenset()))
    assert writer.close() is None
    writer = CheckpointWriter(tmp_path)
    writer.prune(1, frozenset())
    writer.prune(1, Unremovable())
    assert str(writer.close()) == "checkpoint-1: cannot be removed"
    assert writer.close() is None, "it is closed already"


def test_closing_gives_the_hosts_memory_back(tmp_path):
    grpo, copies = learner(config()), []

    def pin(memory):
        copies.append(HostCopy(memory))
        return copies[-1]

    writer = CheckpointWriter(tmp_path, Reservation(pin))
    writer.start(freeze_checkpoint(1, grpo.policy, grpo.training, STATE))
    writer.close()
    assert [copy.closed for copy in copies] == [True]
    writer.close()  # a copy refuses to be closed twice


class Reservation:
    """Reserves host memory as on CUDA, and takes note of the sizes."""

    def __init__(self, pin=HostCopy):
        self.pin, self.sizes = pin, []

    def __call__(self, size):
        self.sizes.append(size)
        return reserve(size, self.pin, lambda: 2 * size)


def test_beside_a_copy_in_the_hosts_memory_nothing_holds_the_arrays_of_its_moment(tmp_path):
    grpo = learner(config())
    groups, may_go_on = groups_of(grpo.policy), threading.Event()
    grpo.update(groups)
    before, reservation = weights(grpo), Reservation()
    with contextlib.closing(CheckpointWriter(tmp_path, reservation)) as writer:
        assert writer.reserves_memory
        writer.prepare(freeze_checkpoint(0, grpo.policy, grpo.training, STATE))
        active = mx.get_active_memory()
        written = writer.start(slowly(freeze_checkpoint(1, grpo.policy, grpo.training, STATE), may_go_on))
        grpo.update(groups)
        done, grown = written.done(), mx.get_active_memory() - active
        may_go_on.set()
        written.result(60)
    assert not done
    # 8.4 MB of weights and moments were replaced; what was frozen would still be held.
    assert grown < 1_000_000
    assert_same_weights(before, dict(mx.load(str(tmp_path / "checkpoint-1" / "model.safetensors"))))
    assert len(reservation.sizes) == 1


def test_the_next_copy_waits_until_the_one_before_is_written(tmp_path):
    grpo = learner(config())
    first: list[Future] = []
    done = []

    class Noting(HostCopy):
        def store(self, arrays):
            done.extend(each.done() for each in first)
            return super().store(arrays)

    with contextlib.closing(CheckpointWriter(tmp_path, Reservation(Noting))) as writer:
        first.append(writer.start(freeze_checkpoint(1, grpo.policy, grpo.training, STATE)))
        writer.start(freeze_checkpoint(2, grpo.policy, grpo.training, STATE))
    assert done == [True]
    assert [verify(checkpoint, to_resume=True) for checkpoint in find_checkpoints(tmp_path)] == [None, None]


def test_training_waits_where_the_host_has_no_memory_for_the_copy_or_too_little(tmp_path):
    grpo = learner(config())
    small = reserve(16, HostCopy, lambda: 32)
    for update, host_memory in ((1, None), (2, small)):
        with contextlib.closing(CheckpointWriter(tmp_path, lambda _, memory=host_memory: memory)) as writer:
            assert writer.start(freeze_checkpoint(update, grpo.policy, grpo.training, STATE)).done()
    assert [checkpoint.update for checkpoint in find_checkpoints(tmp_path)] == [1, 2]
