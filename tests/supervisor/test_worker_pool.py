"""The pool by its records alone: real ones in their form, and workers that nobody starts."""

import json

import pytest

from grpo_actors.config import load_config
from grpo_actors.observe.records import make_record
from grpo_actors.rundir.claim import claimed
from grpo_actors.rundir.decisions import kept_workers
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.worker_pool import WorkerPool

#: 2 skipped and 3 blocks of 4 updates, each of 1 s.
WINDOW = 14


class Told:
    """A pool on a machine with room for eight, and the records that it is shown."""

    def __init__(self, folder, workers="auto"):
        settings = [f"workers={workers}", "task=arithmetic", "batch_size=16"]
        self.folder = folder
        self.pool = WorkerPool(
            folder, load_config(None, settings).config, Machine("cuda", 16, 2**36, 2**36), "ipc://x"
        )
        self.update = 0

    def record(self, topic, **fields):
        self.pool.take_in(make_record(1, 0.0, topic, fields))

    def worker(self, name, state="sampling", groups=1, role="rollout"):
        self.record("worker", worker=name, state=state, groups=groups, role=role)

    def updates(self, count, total=1000, **fields):
        for _ in range(count):
            self.update += 1
            told = {"update": self.update, "total_updates": total, "update_s": 1.0, "wait_s": 0.6}
            self.record("metrics", **told | {"rollout_tokens_per_s": 1000.0} | fields)

    @property
    def reasons(self):
        path = self.folder / "workers.json"
        kept = json.loads(path.read_text())["decisions"] if path.exists() else []
        return [decision["reason"] for decision in kept]

    @property
    def names(self):
        return [member.name for member in self.pool.members]


@pytest.fixture
def told(tmp_path):
    told = Told(tmp_path)
    told.worker("rollout-0")
    return told


def test_the_learners_own_share_is_taken_and_wait_s_where_there_is_none(told, tmp_path):
    told.updates(WINDOW, learner_wait_share=0.3)
    assert told.reasons == ["the learner waits 30% of an update of 1.00 s"]
    (tmp_path / "other").mkdir()
    other = Told(tmp_path / "other")
    other.worker("rollout-0")
    other.updates(WINDOW)
    assert other.reasons == ["the learner waits 60% of an update of 1.00 s"]


def test_the_trial_begins_with_the_newcomers_first_group(told):
    told.updates(WINDOW)
    assert told.names == ["rollout-0", "rollout-1"]
    told.worker("rollout-1", "joined", groups=0)
    told.updates(WINDOW)
    assert len(told.reasons) == 1
    told.worker("rollout-1")
    told.updates(WINDOW, rollout_tokens_per_s=1050.0)
    assert told.reasons[1:] == ["one worker more gave 1.05 times the rate"]
    assert told.names == ["rollout-0"]
    assert kept_workers(told.folder) == 1


def test_an_attached_worker_restarts_the_window_and_is_not_counted(told):
    told.updates(WINDOW - 1)
    told.worker("attached-host-1")
    told.updates(WINDOW - 1)
    assert told.reasons == []
    told.updates(1)
    assert told.names == ["rollout-0", "rollout-1"]


def test_an_evaluator_that_joins_changes_nothing(told):
    told.updates(WINDOW - 1)
    told.worker("evaluator", role="evaluator")
    told.updates(1)
    assert len(told.reasons) == 1


def test_a_worker_on_trial_does_not_count_as_kept(told):
    told.updates(WINDOW)
    assert kept_workers(told.folder) == 1


@pytest.mark.parametrize("kept", ["", "[2]", "{}", '{"kept": "2"}', '{"kept": 0}'])
def test_what_is_kept_and_makes_no_sense_is_as_good_as_nothing(tmp_path, kept):
    (tmp_path / "workers.json").write_text(kept)
    assert kept_workers(tmp_path) == 1


def test_a_folder_that_cannot_be_written_is_told_and_the_run_goes_on(told):
    (told.folder / "workers.json.tmp").mkdir()
    told.updates(WINDOW)
    assert told.names == ["rollout-0", "rollout-1"]
    said = [text for text, _ in told.pool.look_after(lifeline=-1)]
    assert said[-1] == f"{told.folder / 'workers.json'} cannot be written (Is a directory)"


def test_when_all_updates_are_done_nobody_comes_or_goes_any_more(told):
    told.updates(WINDOW)
    told.worker("rollout-1")
    told.updates(1, total=told.update + 1)
    told.worker("rollout-0", "left")
    assert len(told.reasons) == 1


def test_a_new_run_in_an_old_folder_begins_with_one(tmp_path):
    (tmp_path / "workers.json").write_text('{"kept": 3}')
    assert Told(tmp_path).names == ["rollout-0", "rollout-1", "rollout-2"]
    with claimed(
        load_config(None, [f"output_dir={tmp_path}"]).config
    ):  # there is no checkpoint to go on from
        assert Told(tmp_path).names == ["rollout-0"]


def test_a_fixed_number_stays_as_it_is(tmp_path):
    told = Told(tmp_path, workers=2)
    told.worker("rollout-0")
    told.updates(10 * WINDOW)
    assert (told.names, told.reasons) == (["rollout-0", "rollout-1"], [])
