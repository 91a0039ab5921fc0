"""What a run records besides its updates: the decisions on the number of workers."""

import contextlib
import json

from hand_made import config, groups_of, learner

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
def begun(folder):
    """Open a learner in `folder` that continues from its checkpoint, if there is one, with its history."""
    settings = config()
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
