"""Test the pool by its records. The records have the real format; where a worker ends, another program runs in its place."""

import json
import signal
import subprocess
import sys

import pytest
from bounds import HANG_S
from machines import cpu, cuda

from grpo_actors.config import load_config
from grpo_actors.observe.records import make_record
from grpo_actors.rundir.claim import claimed
from grpo_actors.rundir.decisions import kept_workers
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.shares import Shares
from grpo_actors.supervisor.worker_pool import WorkerPool

#: Updates of a window: 2 skipped and 3 blocks of 4, each update of 1 s.
WINDOW = 14


class RecordedPool:
    """A pool on a machine with room for eight workers, with methods that give it records."""

    def __init__(self, folder, workers="auto", machine=None, settings=()):
        settings = [f"workers={workers}", "task=arithmetic", "batch_size=16", *settings]
        self.folder = folder
        config = load_config(None, settings).config
        self.pool = WorkerPool(
            folder, config, Shares(config, allocate(config, machine or cuda(2**36))), "ipc://x"
        )
        self.update = 0

    def record(self, topic, **fields):
        self.pool.handle_record(make_record(1, 0.0, topic, fields))

    def worker(self, name, state="sampling", groups=1, role="rollout"):
        self.record("worker", worker=name, state=state, groups=groups, role=role)

    def updates(self, count, total=1000, **fields):
        for _ in range(count):
            self.update += 1
            usual = {"update": self.update, "total_updates": total, "update_s": 1.0, "wait_s": 0.6}
            self.record("metrics", **usual | {"rollout_tokens_per_s": 1000.0} | fields)

    def runs(self, number, program="import time; time.sleep(600)"):
        """Run a program as the process of a worker; return the process."""
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
        self.pool.actors[number].process = process
        return process

    def dies(self, number, code=-9):
        """Let the process of a worker end."""
        ends = f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
        self.runs(number, ends).wait(HANG_S)

    @property
    def reasons(self):
        path = self.folder / "workers.json"
        kept = json.loads(path.read_text())["decisions"] if path.exists() else []
        return [decision["reason"] for decision in kept]

    @property
    def names(self):
        return [worker.name for worker in self.pool.workers]


@pytest.fixture
def pool(tmp_path):
    pool = RecordedPool(tmp_path)
    pool.worker("rollout-0")
    return pool


def test_the_share_of_waiting_is_the_learners_figure_or_else_computed_from_wait_s(pool, tmp_path):
    pool.updates(WINDOW, learner_wait_share=0.3)
    assert pool.reasons == ["the learner waits 30% of an update of 1.00 s"]
    (tmp_path / "other").mkdir()
    other = RecordedPool(tmp_path / "other")
    other.worker("rollout-0")
    other.updates(WINDOW)
    assert other.reasons == ["the learner waits 60% of an update of 1.00 s"]


def test_a_learner_that_tells_no_waiting_does_not_wait(pool):
    pool.updates(WINDOW, wait_s=None)
    assert pool.reasons == ["the learner waits 0% of an update of 1.00 s"]
    assert pool.names == ["rollout-0"]


def test_an_update_without_its_time_or_its_tokens_is_not_measured(pool):
    pool.updates(WINDOW, update_s=0.0)
    pool.updates(WINDOW, rollout_tokens_per_s=None)
    assert pool.reasons == []


def test_what_a_worker_reports_while_it_works_restarts_nothing(pool):
    pool.updates(WINDOW - 1)
    pool.worker("rollout-0", groups=2)
    pool.updates(1)
    assert len(pool.reasons) == 1


# 0.95 × 80 = 76 GB hold the learner and as many workers of its size: with a context of 1.3 GB, 2 of 21.3 but only 0 of 41.3.
@pytest.mark.parametrize(("memory_gb", "workers"), [(20.0, 2), (40.0, 1)])
def test_a_model_of_the_hub_counts_as_large_as_the_learner_was_measured(tmp_path, memory_gb, workers):
    settings = ["model_name=owner/name", "eval_every_updates=0"]
    pool = RecordedPool(tmp_path, machine=cuda(80e9), settings=settings)
    pool.worker("rollout-0")
    pool.updates(WINDOW, memory_gb=memory_gb)
    assert len(pool.names) == workers


def test_the_trial_starts_with_the_new_workers_first_group(pool):
    pool.updates(WINDOW)
    assert [actor.name for actor in pool.pool.actors] == pool.names == ["rollout-0", "rollout-1"]
    pool.worker("rollout-1", "joined", groups=0)
    pool.updates(WINDOW)
    assert len(pool.reasons) == 1
    pool.worker("rollout-1")
    second = pool.runs(1)
    pool.updates(WINDOW, rollout_tokens_per_s=1050.0)
    assert pool.reasons[1:] == ["one worker more gave 1.05 times the rate"]
    assert pool.names == ["rollout-0"]
    assert kept_workers(pool.folder) == 1
    # The one that is stopped is not started again.
    assert second.wait(HANG_S) == -signal.SIGTERM
    assert list(pool.pool.revive(lifeline=-1))[3:] == []
    assert pool.pool.actors[1].is_over


def test_a_worker_that_joins_while_another_loads_ends_the_trial(pool):
    pool.updates(WINDOW)
    pool.worker("attached-host-1")
    assert pool.reasons[1:] == ["other workers joined or left during its trial; a new trial follows"]
    assert pool.names == ["rollout-0"]


def test_an_attached_worker_restarts_the_window_and_is_not_counted(pool):
    pool.updates(WINDOW - 1)
    pool.worker("attached-host-1")
    pool.updates(WINDOW - 1)
    assert pool.reasons == []
    pool.updates(1)
    assert pool.names == ["rollout-0", "rollout-1"]


def test_an_evaluator_that_joins_changes_nothing(pool):
    pool.updates(WINDOW - 1)
    pool.worker("evaluator", role="evaluator")
    pool.updates(1)
    assert len(pool.reasons) == 1


def test_a_worker_on_trial_does_not_count_as_kept(pool):
    pool.updates(WINDOW)
    assert kept_workers(pool.folder) == 1


@pytest.mark.parametrize("kept", ["", "[2]", "{}", '{"kept": "2"}', '{"kept": 0}'])
def test_an_unusable_file_counts_as_no_file(tmp_path, kept):
    (tmp_path / "workers.json").write_text(kept)
    assert kept_workers(tmp_path) == 1


def test_a_folder_that_cannot_be_written_is_reported_and_the_run_continues(pool):
    (pool.folder / "workers.json.tmp").mkdir()
    pool.updates(WINDOW)
    assert pool.names == ["rollout-0", "rollout-1"]
    notes = [text for text, _ in pool.pool.revive(lifeline=-1)]
    assert notes == [
        "rollout workers: 1 to begin with, at most 8 (more are never tried)",
        "rollout workers: 1 → 2 (the learner waits 60% of an update of 1.00 s)",
        f"{pool.folder / 'workers.json'} cannot be written (Is a directory)",
    ]


def test_after_the_last_update_no_worker_is_started_or_stopped(pool):
    pool.updates(WINDOW)
    pool.worker("rollout-1")
    pool.updates(1, total=pool.update + 1)
    pool.worker("rollout-0", "left")
    assert len(pool.reasons) == 1


def test_a_new_run_in_an_old_folder_starts_with_one_worker(tmp_path):
    (tmp_path / "workers.json").write_text('{"kept": 3}')
    assert RecordedPool(tmp_path).names == ["rollout-0", "rollout-1", "rollout-2"]
    # The folder has no checkpoint to continue from.
    with claimed(load_config(None, [f"output_dir={tmp_path}"]).config):
        assert RecordedPool(tmp_path).names == ["rollout-0"]


def test_a_fixed_number_does_not_change(tmp_path):
    pool = RecordedPool(tmp_path, workers=2)
    pool.worker("rollout-0")
    pool.updates(10 * WINDOW)
    assert (pool.names, pool.reasons) == (["rollout-0", "rollout-1"], [])


def test_auto_begins_on_every_gpu_without_a_learner_and_a_restarted_worker_keeps_its_own(tmp_path):
    pool = RecordedPool(tmp_path, machine=cuda(2**36, 2**36, 2**36))

    def gpus():
        return {worker.name: worker.environment["CUDA_VISIBLE_DEVICES"] for worker in pool.pool.workers}

    begun = {"rollout-0": "GPU-1", "rollout-1": "GPU-2"}
    assert gpus() == begun
    for name in begun:
        pool.worker(name)
    pool.updates(WINDOW)
    assert gpus() == begun | {"rollout-2": "GPU-1"}
    # The environment is the actor's: each start of its process has it.
    assert pool.pool.workers[0].environment["GRPO_ACTORS_DEVICE"] == "GPU 1"


# --- workers that end -----------------------------------------------------------------------------


def test_of_several_workers_auto_does_without_one_that_died_and_starts_a_single_one_again(pool):
    pool.updates(WINDOW)
    pool.dies(0)
    notes = list(pool.pool.revive(lifeline=-1))
    assert notes[-1] == ("rollout workers: 2 → 1 (a worker was ended by signal 9)", "")
    assert pool.names == ["rollout-1"]
    pool.dies(1)
    assert list(pool.pool.revive(lifeline=-1)) == [
        ("rollout-1 was ended by signal 9; starts again in 1 s", "yellow")
    ]
    assert pool.names == ["rollout-1"]


def test_a_death_before_the_first_update_is_saved_as_one_at_the_start(tmp_path):
    (tmp_path / "workers.json").write_text('{"kept": 2}')
    pool = RecordedPool(tmp_path)
    pool.dies(1)
    assert list(pool.pool.revive(lifeline=-1))
    [decision] = json.loads((tmp_path / "workers.json").read_text())["decisions"]
    assert (decision["update"], decision["workers"]) == (0, 1)


def test_a_decision_after_a_record_without_a_number_is_saved_as_one_at_the_start(pool):
    pool.updates(WINDOW, update=None)
    [decision] = json.loads((pool.folder / "workers.json").read_text())["decisions"]
    assert decision["update"] == 0


def test_of_a_fixed_number_each_is_started_again_until_all_are_hopeless(tmp_path):
    pool = RecordedPool(tmp_path, workers=2)
    assert not pool.pool.is_hopeless
    pool.dies(0)
    assert list(pool.pool.revive(lifeline=-1)) == [
        ("rollout-0 was ended by signal 9; starts again in 1 s", "yellow")
    ]
    pool.dies(0, code=2)
    assert not pool.pool.is_hopeless
    pool.dies(1, code=2)
    assert pool.pool.is_hopeless
    (tmp_path / "none").mkdir()
    assert not RecordedPool(tmp_path / "none", workers=0).pool.is_hopeless


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ([], []),
        (["rollout_ranks=2"], ["--ranks", "2"]),
        (["functions={ 'rewards.py:brevity' = 1.0 }"], ["--allow", "rewards.py:brevity"]),
        (["scheme=tcp", "host=10.0.0.7"], ["--key", "run.key"]),
    ],
)
def test_a_worker_is_told_all_that_it_needs(tmp_path, settings, more):
    [worker] = RecordedPool(tmp_path, workers=1, machine=cpu(), settings=settings).pool.workers
    command = ["grpo_actors.rollout", "--connect", "ipc://x", "--name", "rollout-0", "--patience", "0"]
    command += ["--preload", str(tmp_path / "config.json")]
    assert sorted(word.removeprefix(f"{tmp_path}/") for word in worker.command) == sorted(
        [word.removeprefix(f"{tmp_path}/") for word in command] + more
    )
    assert (worker.respawns, worker.is_watched, worker.gives_up_work) == (True, True, True)
