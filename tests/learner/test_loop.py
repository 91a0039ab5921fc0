"""The order of events in the training loop, and how it ends, with a source made by hand."""

import os

import pytest
from hand_made import config, groups_of, learner

from grpo_actors import progress
from grpo_actors.errors import RunError
from grpo_actors.learner.archive import Archive
from grpo_actors.learner.history import History
from grpo_actors.learner.loop import Run, train
from grpo_actors.process import StopRequest
from grpo_actors.progress import LOADING_S, LOST_S
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.schedule.lease import Cursor


class HandSource:
    """A source that gives the same groups for some updates, and lists its calls and records in order."""

    def __init__(self, groups, updates, alarms=()):
        self.groups, self.updates, self.alarms = groups, updates, list(alarms)
        self.events, self.reason, self.ended_by = [], None, None

    def next_batch(self):
        self.updates -= 1
        return self.groups if self.updates >= 0 else None

    def publish(self, grpo, groups):
        assert groups is self.groups
        self.events.append(f"publish {grpo.version}")

    def sampled_per_s(self, update_s):
        assert update_s > 0

    def alarm(self):
        return self.alarms.pop(0) if self.alarms else None

    def take_evaluations(self):
        self.events.append("take evaluations")

    def finish(self, ended_by):
        self.events.append("finish")
        self.ended_by = ended_by

    def record(self, topic, **fields):
        self.events.append(topic)
        self.reason = fields.get("reason")

    def snapshot(self):
        return Snapshot(Cursor(), 0)


@pytest.fixture
def trained(tmp_path):
    """Return a function that trains for some updates, at most `total`, and returns the exit code and the source."""

    def run(updates, *, total, stop=False, alarms=(), **sections):
        settings = config(run={"save_steps": 2})
        settings = settings.model_copy(update={"health": settings.health.model_copy(update=sections)})
        grpo, request = learner(settings, total=total), StopRequest()
        if stop:
            request.set()
        source = HandSource(groups_of(grpo.policy), updates, alarms)
        history = History(tmp_path, settings, grpo, Archive(tmp_path, settings, "run"), source)
        return train(Run(grpo, source, history, request)), source

    return run


def test_an_update_is_published_then_recorded_and_at_the_end_the_source_finishes(trained):
    code, source = trained(3, total=3)
    assert code == 0
    # A checkpoint is recorded when it is durable, which may be some records later.
    assert [event for event in source.events if event not in ("sample", "checkpoint")] == [
        *("publish 1", "metrics", "take evaluations"),
        *("publish 2", "metrics", "take evaluations"),
        *("publish 3", "metrics", "take evaluations"),
        *("finish", "stop"),
    ]


def test_every_checkpoint_is_recorded_after_its_update_and_before_the_source_finishes(trained):
    _, source = trained(3, total=3)
    first, last = (at for at, event in enumerate(source.events) if event == "checkpoint")
    assert source.events.index("publish 2") < first < last
    assert source.events.index("publish 3") < last < source.events.index("finish")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_error(trained, tmp_path):
    (tmp_path / "checkpoint-2.tmp").write_text("a file where the checkpoint's folder should be made")
    with pytest.raises(RunError, match="checkpoint-2: cannot be written"):
        trained(3, total=3)
    assert not (tmp_path / "checkpoint-3").exists()


def test_the_supervisor_is_told_each_piece_of_work_and_how_long_it_may_take(trained, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setenv(progress.PROGRESS, str(write))
    monkeypatch.setattr(progress, "_reporter", progress._Reporter())
    trained(2, total=2)
    os.close(write)
    with os.fdopen(read) as told:
        works = dict.fromkeys(told.read().splitlines())  # a work is reported again while it goes on
    # The first update may compile; of the others one knows how long they take.
    assert list(works) == [
        f"{LOADING_S} update 1",
        f"{LOADING_S} the checkpoint of update 1",
        f"{LOST_S} update 2",
        f"{LOADING_S} the checkpoint of update 2",
        f"{LOADING_S} the end of the run",
    ]


def test_the_archive_is_prepared_while_the_first_batch_is_sampled(trained, monkeypatch):
    prepared = []
    monkeypatch.setattr(Archive, "prepare", lambda _, grpo: prepared.append(grpo.version))
    trained(2, total=2)
    assert prepared == [0]


@pytest.mark.parametrize(
    ("updates", "stop", "reason"),
    [
        (2, False, "all updates done"),
        (2, True, "all updates done"),
        (1, False, "the recording ends after update 1"),
        (1, True, "asked to stop after update 1"),
    ],
)
def test_the_last_record_says_why_it_ended(trained, updates, stop, reason):
    code, source = trained(updates, total=2, stop=stop)
    assert (code, source.reason, source.ended_by) == (0, reason, None)


@pytest.mark.parametrize(("on_alarm", "code", "updates"), [("stop", 1, 1), ("warn", 0, 2)])
def test_an_alarm_of_the_source_ends_the_run_where_the_settings_say_so(trained, on_alarm, code, updates):
    ended, source = trained(2, total=2, alarms=["no signal: x"], on_alarm=on_alarm)
    assert ended == code
    assert source.events.count("metrics") == updates
    assert (source.reason, source.ended_by) == (
        ("alarm: no signal: x", "no signal: x") if code else ("all updates done", None)
    )
