"""What a run records besides its updates: decisions on the number of workers, missing groups, and how it ended."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from checkpoint_files import write_checkpoint_files
from hand_made import RecordList, config, groups_of, learner

from grpo_actors.learner.archive import Archive
from grpo_actors.learner.history import History
from grpo_actors.observe.sinks import Journal
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.rundir.decisions import Decision, append_decision, decisions
from grpo_actors.schedule.lease import Cursor

FIRST = Decision(1, 2, "the learner waits 60% of an update of 1.00 s")
SECOND = Decision(2, 1, "one worker more gave 1.05 times the rate")


class InJournal:
    """Keeps records in the run folder, as a live run does."""

    def __init__(self, folder, seq):
        self.journal = Journal(folder, seq=seq)

    def record(self, topic, **fields):
        self.journal.append(topic, fields)

    def snapshot(self):
        return Snapshot(Cursor(), self.journal.seq)


@contextlib.contextmanager
def begun(folder, **changes):
    """Open a learner in `folder` that continues from its checkpoint, if there is one, with its history."""
    settings = config(**changes)
    archive, grpo = Archive(folder, settings, "run"), learner(settings)
    archive.restore(grpo)
    records = InJournal(folder, archive.records)
    with records.journal:
        yield grpo, History(folder, settings, grpo, archive, records)


def updated(grpo, history):
    groups = groups_of(grpo.policy)
    metrics = grpo.update(groups)
    history.record_update(groups, metrics, update_s=1.0, wait_s=0.5, rollout_tokens_per_s=10.0)


def decided(folder):
    """Return (update, before, workers, reason) of each decision in the records."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("update", "before", "workers", "reason")
    return [tuple(record[key] for key in keys) for record in records if record["topic"] == "headcount"]


def test_each_decision_about_workers_is_recorded_once_even_if_a_continued_run_has_cut_it(tmp_path):
    first, second = ((1, 1, 2, FIRST.reason), (2, 2, 1, SECOND.reason))
    append_decision(tmp_path, FIRST, update=1, kept=1)
    with begun(tmp_path) as (grpo, history):
        updated(grpo, history)
        history.save_last()
        assert decided(tmp_path) == [first]
        updated(grpo, history)
        assert decided(tmp_path) == [first], "once"
        append_decision(tmp_path, SECOND, update=2, kept=1)
        history.end("asked to stop")
        assert decided(tmp_path) == [first, second], "nothing is lost at the end"
    with begun(tmp_path) as (grpo, history):  # from update 1, after which the second one was recorded
        assert decided(tmp_path) == [first]
        updated(grpo, history)
        assert decided(tmp_path) == [first, second]


@pytest.mark.parametrize(("update_s", "share"), [(4.0, 0.25), (0.0, None)])
def test_an_update_is_recorded_with_its_epoch_and_the_share_of_its_wait(tmp_path, update_s, share):
    with begun(tmp_path, record_groups=True) as (grpo, history), contextlib.closing(history):
        groups = groups_of(grpo.policy)
        groups[-1] = replace(groups[-1], epoch=1)  # the update ends in the next epoch
        measured = grpo.update(groups)
        history.record_update(groups, measured, update_s=update_s, wait_s=1.0, rollout_tokens_per_s=10.0)
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    [metrics] = [record for record in records if record["topic"] == "metrics"]
    assert (metrics["update"], metrics["total_updates"], metrics["epoch"]) == (1, 10, 1)
    assert (metrics["update_s"], metrics["wait_s"], metrics["learner_wait_share"]) == (update_s, 1.0, share)
    lines = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    # 10 updates of 4 groups are planned.
    assert {(line["update"], line["planned_groups"]) for line in lines} == {(1, 40)}
    assert len(lines) == 4


def test_a_foreign_workers_file_is_no_decision_and_no_failure(tmp_path):
    with begun(tmp_path) as (grpo, history):
        for content in ("", "[1]", '{"decisions": 3}', '{"decisions": [3, "x"]}'):
            (tmp_path / "workers.json").write_text(content)
            updated(grpo, history)
            append_decision(tmp_path, FIRST, update=1, kept=1)  # and our next decision replaces it
            assert [one["workers"] for one in decisions(tmp_path)] == [FIRST.workers]
            (tmp_path / "workers.json").unlink()
        (tmp_path / "workers.json").mkdir()
        updated(grpo, history)
        assert decided(tmp_path) == []


def history_of(folder, *, version=0, **metrics):
    """Return the history of a run that has done `version` updates; the learner itself is not needed."""
    settings = config()
    settings = settings.model_copy(update={"metrics": settings.metrics.model_copy(update=metrics)})
    records = RecordList()
    archive = Archive(folder, settings, "run")
    policy = SimpleNamespace(chat=SimpleNamespace(ends_turns=True))
    grpo = SimpleNamespace(version=version, total_updates=10, policy=policy)
    return History(folder, settings, grpo, archive, records)


@pytest.mark.parametrize(
    ("version", "recorded", "missing"),
    [(0, 0, None), (2, 2, None), (2, 1, "2 to 2"), (3, 0, "1 to 3")],
)
def test_a_resumed_run_says_which_updates_its_recorded_groups_lack(tmp_path, version, recorded, missing):
    if version:
        write_checkpoint_files(tmp_path, version)
    (tmp_path / "groups.jsonl").write_text(
        "".join(f'{{"update":{update},"x":1}}\n' for update in range(1, recorded + 1))
    )
    with contextlib.closing(history_of(tmp_path, version=version, record_groups=True)) as history:
        history.begin()
    logged = [fields["text"] for topic, fields in history.records.records if topic == "log"]
    assert logged == ([] if missing is None else [f"groups.jsonl lacks updates {missing}"])


def test_without_recorded_groups_none_are_missed(tmp_path):
    history = history_of(tmp_path, record_groups=False)
    history.begin()
    assert [topic for topic, _ in history.records.records] == ["start"]


def test_the_last_record_and_the_exit_code_tell_an_alarm_from_an_end(tmp_path):
    history = history_of(tmp_path)
    assert history.end("all updates done") == 0
    history.ended_by = "reward: fell"
    assert history.end("all updates done") == 1
    assert [fields for topic, fields in history.records.records if topic == "stop"] == [
        {"reason": "all updates done", "exit_code": 0},
        {"reason": "alarm: reward: fell", "exit_code": 1},
    ]


@pytest.mark.parametrize(("on_alarm", "ended_by"), [("stop", "first"), ("warn", None)])
def test_the_first_alarm_ends_the_run_where_the_settings_say_so(tmp_path, on_alarm, ended_by):
    history = history_of(tmp_path)
    health = history.config.health.model_copy(update={"on_alarm": on_alarm})
    history.config = history.config.model_copy(update={"health": health})
    history.note_alarm("first")
    history.note_alarm("second")
    assert history.ended_by == ended_by
