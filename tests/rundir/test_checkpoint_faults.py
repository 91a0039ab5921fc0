"""Checkpoints under real faults: a writer killed at any moment, a full disk."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from bounds import HANG_S
from small_disk import small_disk
from written import write_checkpoint

from grpo_actors.config import LearnerConfig
from grpo_actors.errors import RunError
from grpo_actors.failpoints import FAILPOINTS
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoints import (
    find_checkpoints,
    newest_sound,
    prune,
    read_state,
    remove_unfinished,
    verify,
)
from grpo_actors.rundir.folder import STATE

ROOT = Path(__file__).parents[2]


WRITING = [sys.executable, str(Path(__file__).with_name("writing.py"))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


class Writers:
    """Writers one after another, each a fork of a process that has loaded all packages."""

    def __init__(self, process, failpoints):
        self._process = process
        self.failpoints = failpoints

    def start(self, run_dir):
        """Start the next writer; return its process id."""
        print(run_dir, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def wait(self):
        """Return once the writer has been killed."""
        assert self._process.stdout.readline() == "ended\n"

    def assert_running(self):
        assert self._process.poll() is None


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    failpoints = tmp_path_factory.mktemp("failpoints")
    environment = ENVIRONMENT | {FAILPOINTS: str(failpoints)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*WRITING, "again"], env=environment, stdin=pipe, stdout=pipe, text=True
    ) as process:
        yield Writers(process, failpoints)
        process.stdin.close()


def is_what_was_written(checkpoint):
    """Return whether all weights and the state equal the checkpoint's number."""
    arrays = mx.load(str(checkpoint.path / "model.safetensors"))
    return read_state(checkpoint).records == checkpoint.update and all(
        mx.all(array == checkpoint.update) for array in arrays.values()
    )


def assert_sound(run_dir):
    """Check every checkpoint; return the number of the newest, 0 if there is none."""
    for checkpoint in find_checkpoints(run_dir):
        assert verify(checkpoint) is None
        assert is_what_was_written(checkpoint)
    newest, faults = newest_sound(run_dir)
    assert faults == []
    return newest.update if newest else 0


@pytest.mark.parametrize(
    "stage",
    [
        "checkpoint.begun",
        "checkpoint.written",
        "checkpoint.manifest",
        "checkpoint.sealed",
        "folder.discarded",
    ],
)
def test_a_kill_at_any_stage_leaves_a_sound_checkpoint_and_no_false_one(run_dir, writers, stage):
    writer = writers.start(run_dir)
    while not find_checkpoints(run_dir):
        writers.assert_running()
    (writers.failpoints / "draft").write_text("kill")
    (writers.failpoints / "draft").rename(writers.failpoints / stage)
    writers.wait()
    assert (writers.failpoints / f"{stage}.{writer}").exists(), "it was killed there"
    assert assert_sound(run_dir) >= 1


@pytest.mark.faults
def test_two_hundred_kills_at_random_moments_leave_sound_checkpoints(run_dir, writers, note_figures):
    """A checkpoint takes about 0.03 s."""
    rng, loads, fresh = random.Random(0), 0, 0
    newest = 0
    for number in range(200):
        writer = writers.start(run_dir)
        # Every other writer completes a checkpoint, however busy the machine is: there is something to take back.
        while number % 2 == 0 and max((c.update for c in find_checkpoints(run_dir)), default=0) <= newest:
            writers.assert_running()
        deadline = time.monotonic() + rng.uniform(0.0, 0.12)
        while time.monotonic() < deadline:
            os.sched_yield()
        os.kill(writer, signal.SIGKILL)
        writers.wait()
        loads += len(list(find_checkpoints(run_dir)))
        survivor = assert_sound(run_dir)
        assert survivor >= newest, "a kill took back what had been written"
        fresh += survivor > newest
        newest = survivor
        remove_unfinished(run_dir)  # as the next learner would
        prune(run_dir, 2, frozenset())
    note_figures(f"200 kills: {loads} checkpoints loaded, 0 bad; {newest} written in all")
    assert fresh >= 100, "the writers were killed too early to show anything"


def assert_nothing_half_written(run_dir):
    assert [path for path in run_dir.iterdir() if path.suffix] == []
    for checkpoint in find_checkpoints(run_dir):
        assert verify(checkpoint) is None


@pytest.mark.parametrize("limit", [100_000, 3_000_000])
def test_a_file_that_cannot_be_completed_is_one_error_and_leaves_nothing_behind(run_dir, limit):
    # In float32 the weights take 2.8 MB and the optimizer's state 5.6 MB: each of the two fails once.
    writer = subprocess.run(
        [*WRITING, str(run_dir), str(limit)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    fault = writer.stderr
    assert writer.returncode == 2
    assert fault.startswith("error: ")
    assert "checkpoint-1: cannot be written" in fault
    assert fault.count("\n") == 1
    assert list(run_dir.iterdir()) == []


def test_a_full_disk_is_one_error_and_keeps_the_last_checkpoint(run_dir, tiny):
    training = Training(tiny.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))
    with small_disk(run_dir, 12):  # one checkpoint is 8.4 MB
        write_checkpoint(run_dir, 1, tiny, training, {"records": 1})
        with pytest.raises(RunError, match=r"checkpoint-2: cannot be written.*free space"):
            write_checkpoint(run_dir, 2, tiny, training, {"records": 2})
        assert_nothing_half_written(run_dir)
        newest, faults = newest_sound(run_dir)
        assert newest is not None
        assert (newest.update, faults) == (1, [])


def test_a_folder_that_cannot_be_written_is_one_error(run_dir, tiny):
    training = Training(tiny.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))
    (run_dir / "file").write_text("")
    with pytest.raises(RunError, match=r"checkpoint-1: cannot be written: Not a directory$"):
        write_checkpoint(run_dir / "file", 1, tiny, training, {})


def test_a_damaged_newest_checkpoint_is_skipped_with_one_line(run_dir, tiny):
    training = Training(tiny.model, LearnerConfig(), lambda *_: (mx.zeros(()), mx.zeros(1)))
    good = write_checkpoint(run_dir, 1, tiny, training, {"records": 1})
    for name in ("model.safetensors", "optimizer.safetensors", STATE, "config.json", "manifest.json"):
        for damage in ("cut", "flip", "gone"):
            newest = write_checkpoint(run_dir, 2, tiny, training, {"records": 2})
            content = bytearray((newest.path / name).read_bytes())
            if damage == "cut":
                (newest.path / name).write_bytes(content[: len(content) // 2])
            elif damage == "flip":
                content[len(content) // 2] ^= 4
                (newest.path / name).write_bytes(content)
            else:
                (newest.path / name).unlink()
            found, faults = newest_sound(run_dir)
            assert found == good, (name, damage)
            if (name, damage) == ("manifest.json", "gone"):
                assert faults == []  # a folder without one is no checkpoint at all
            else:
                assert len(faults) == 1, (name, damage)
                assert "checkpoint-2" in faults[0]
