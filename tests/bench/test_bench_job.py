"""A real job measured from outside: what its records and the memory of its processes say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S
from commands import run_here
from scores import score

from grpo_actors.bench.__main__ import main
from grpo_actors.bench.job_report import Interrupt, Job, report
from grpo_actors.bench.watching import MemorySample, Process, names_of, processes

ROOT = Path(__file__).parents[2]
LAUNCHED_AT = 1000.0


def metrics(update, at_s, update_s, wait_s=0.0, **more):
    fields = {"update": update, "update_s": update_s, "wait_s": wait_s, **more}
    return {"topic": "metrics", "time": LAUNCHED_AT + at_s, **fields}


def scored(update, at_s, seconds, accuracy):
    fields = {
        "score": score(accuracy).model_dump(),
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.1,
        "accuracy_high": accuracy + 0.1,
    }
    return {"topic": "eval", "time": LAUNCHED_AT + at_s, "update": update, "seconds": seconds, **fields}


def saved(update, at_s, **more):
    fields = {"update": update, "bytes": 5_000_000_000, **more}
    return {"topic": "checkpoint", "time": LAUNCHED_AT + at_s, **fields}


def figures(*records, ended_at_s=100.0, **more):
    done = report(Job(LAUNCHED_AT, LAUNCHED_AT + ended_at_s, 0, records, **more))
    return done, {row.what: row.value for row in done.rows}


def test_the_first_update_is_a_part_of_the_start_and_of_no_other_figure():
    _, rows = figures(
        metrics(1, at_s=20, update_s=12, wait_s=11),
        metrics(2, at_s=21, update_s=1, wait_s=0.5),
        metrics(3, at_s=26, update_s=5, wait_s=0.0),
        metrics(4, at_s=28, update_s=2, wait_s=0.3),
    )
    assert rows["launch to first update s"] == 20
    assert rows["median update s"] == 2  # of 1, 5 and 2
    assert rows["slowest update s"] == 5
    assert rows["90th percentile s"] == pytest.approx(
        4.4
    )  # 0.9 · 2 = 1.8 places above the least: 2 + 0.8 · (5 − 2)
    assert rows["learner waited, share"] == pytest.approx(0.8 / 8)
    assert rows["last update to exit s"] == 100 - 28


def test_updates_beside_an_evaluation_are_told_from_those_without():
    # The evaluation ran from 33 to 35. Update 3 ended at 33, and may have met its start.
    done, rows = figures(
        *(
            metrics(n, at_s=30 + n, update_s=seconds)
            for n, seconds in enumerate((9, 1, 1, 1, 1.5, 1), start=1)
        ),
        scored(0, at_s=29, seconds=4, accuracy=0.2),
        scored(2, at_s=35, seconds=2, accuracy=0.5),
    )
    # Update 1 took from 22 to 31, the first evaluation from 25 to 29. Update 4 took from 33 to 34, update 5 from 33.5 to 35,
    # update 6 from 35 to 36.
    assert [update.evaluating for update in done.updates] == pytest.approx([4 / 9, 0, 0, 1, 1, 0])
    assert rows["median while evaluating s"] == 1.25
    assert rows["median while not evaluating s"] == 1  # updates 2 and 6
    assert rows["launch to base score s"] == 29
    assert rows["evaluation 2 s"] == 2
    assert rows["accuracy gained, points"] == pytest.approx(30)


def test_a_checkpoint_costs_the_learner_the_time_between_two_updates():
    done, rows = figures(
        metrics(1, at_s=10, update_s=1),
        saved(1, at_s=13),
        metrics(2, at_s=12.75, update_s=0.75),
        saved(2, at_s=15),
        metrics(4, at_s=20, update_s=1),
        saved(4, at_s=21, wait_s=0.25),
    )
    # Update 2 began at 12, two seconds after the end of update 1; the files were whole after three.
    first, second, last = done.checkpoints
    assert (first.sealed_s, first.learner_waited_s, first.next_update_s) == (3, 2, 0.75)
    assert (second.sealed_s, second.learner_waited_s) == (2.25, None), "no update followed"
    assert (last.sealed_s, last.learner_waited_s) == (1, 0.25), "as recorded"
    assert rows["checkpoint 1 s"] == 3


def test_memory_is_the_peak_of_each_process_and_of_their_sum_at_one_moment():
    samples = [
        MemorySample(LAUNCHED_AT, 1_000_000_000, {}, {"supervisor": 50_000_000}),
        MemorySample(
            LAUNCHED_AT + 1, 9_000_000_000, {"learner": 5_000_000_000, "rollout-0": 3_000_000_000}, {}
        ),
        MemorySample(
            LAUNCHED_AT + 2, 8_000_000_000, {"learner": 6_000_000_000, "rollout-0": 1_000_000_000}, {}
        ),
    ]
    _, rows = figures(memory=samples)
    assert rows["GPU memory in use GB"] == 9
    assert rows["GPU memory, all processes GB"] == 8
    assert (rows["GPU memory, learner GB"], rows["GPU memory, rollout-0 GB"]) == (6, 3)
    assert rows["host memory, supervisor GB"] == 0.05


def test_ctrl_c_is_measured_to_the_exit():
    done, rows = figures(interrupt=Interrupt(LAUNCHED_AT + 93, 4, has_checkpoint=True))
    assert rows["Ctrl-C to exit s"] == 7
    assert "the last update is 4, with its checkpoint" in done.as_table()


def test_a_process_belongs_to_the_actor_that_started_it():
    entry = ["python", "-m", "grpo_actors.supervisor.entry"]
    listing = [
        Process(1, 0, 10, ["init"]),
        Process(5, 1, 10, ["python", "launch.py"]),
        Process(6, 5, 10, [*entry, "grpo_actors.learner", "runs/x"]),
        Process(7, 5, 10, [*entry, "grpo_actors.rollout", "--connect", "ipc://x", "--name", "rollout-0"]),
        Process(8, 7, 10, ["python", "-m", "grpo_actors.tasks.own.child"]),
        Process(9, 5, 10, ["nvidia-smi"]),
        Process(10, 1, 10, ["python", "launch.py"]),
    ]
    assert names_of(listing, 5) == {
        5: "supervisor",
        6: "learner",
        7: "rollout-0",
        8: "rollout-0",
        9: "supervisor",
    }


def test_this_process_is_listed_with_its_parent_its_memory_and_its_command():
    [here] = [process for process in processes() if process.pid == os.getpid()]
    assert here.parent == os.getppid()
    assert here.rss_bytes > 10_000_000  # Python and pytest alone take more
    assert "python" in here.command[0]


# --- the command ----------------------------------------------------------------------------------


def bench_run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "grpo_actors.bench", "run", "--config", "smoke_test.toml", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


def test_a_run_that_is_interrupted_is_measured_as_far_as_it_came(tmp_path):
    settings = [
        "max_updates=100000",
        "save_steps=0",
        "eval_every_updates=0",
        "batch_groups=1",
        "max_new_tokens=8",
    ]
    done = bench_run(
        tmp_path,
        "--json",
        "out.json",
        "--interrupt-after",
        "3",
        "--folder",
        "kept",
        *(f"--set={s}" for s in settings),
    )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads((tmp_path / "out.json").read_text())
    rows = {what: row["value"] for what, row in document["figures"].items()}
    assert rows["updates"] == len(document["updates"]) >= 3
    assert 0 < rows["launch to loaded learner s"] < rows["launch to first update s"] < rows["whole command s"]
    assert 0 < rows["Ctrl-C to exit s"] < rows["whole command s"]
    [saved] = document["checkpoints"]
    assert saved["update"] == rows["updates"]
    assert (tmp_path / "kept" / "run" / f"checkpoint-{saved['update']}").is_dir()
    watched = {name for sample in document["memory"] for name in sample["host_of"]}
    assert watched == {"supervisor", "learner", "rollout-0"}
    for what in document["figures"]:
        assert what in done.stdout


def test_a_run_that_fails_gives_its_exit_code_its_last_lines_and_what_was_measured(tmp_path):
    done = bench_run(tmp_path, "--set", "model_name=/nowhere")
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    assert "whole command s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "nonsense=1"], ["nonsense"]),
        (["--interrupt-after", "0"], ["--interrupt-after", "at least 1", "0"]),
        (["--json", "nowhere/out.json"], ["--json", "nowhere"]),
        (["--folder", "."], ["--folder", "new folder"]),
    ],
)
def test_unusable_arguments_are_refused_before_anything_starts(tmp_path, arguments, words):
    done = run_here(main, "run", "--config", "smoke_test.toml", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
