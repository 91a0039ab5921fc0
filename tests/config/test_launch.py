import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S
from commands import launch_here

ROOT = Path(__file__).parents[2]


def launch(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


def test_help_takes_less_than_300_ms_of_a_processor():
    def processor_s():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert launch("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Time on a processor, and the best of five: a busy machine must not fail it.
    assert min(processor_s() for _ in range(5)) < 0.3


def test_help_imports_nothing_heavy():
    code = "import sys, launch; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pydantic", "rich", "mlx", "zmq", "numpy", "msgpack"} & set(loaded)


def test_a_dry_run_prints_the_settings_and_starts_nothing(tmp_path):
    done = launch("--config", "quickstart.toml", "--set", "top_k=5", "--dry-run", cwd=tmp_path)
    split = "6% of the problems (1,200) are held out for evaluation, 20,000 are to train on"
    assert (done.returncode, done.stderr) == (0, f"note: {split}\n")
    assert 'task = "arithmetic"' in done.stdout
    assert "top_k = 5" in done.stdout
    assert "functions = {}" in done.stdout
    assert "# reward: correctness, weight 1, from the task arithmetic\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_how_many_workers_there_is_room_for():
    # Eight groups an update in batches of eight, on-policy: one batch is open at a time.
    settings = ("--set", "workers=auto", "--set", "max_staleness=0")
    done = launch_here("--config", "quickstart.toml", *settings, "--dry-run")
    assert "each further worker" not in done.stdout
    assert "# memory: rollout workers: at most 1 (" in done.stdout


def test_a_dry_run_answers_in_json():
    done = launch_here("--config", "prod.toml", "--resume", "--dry-run", "--json")
    assert json.loads(done.stdout)["config"]["run"]["resume"] == "must"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--config", "prod.toml", "--set", "top_k=-1"],
            "error: --set: rollout.top_k must be a whole number ≥ 0, got -1",
        ),
        (
            ["--config", "prod.toml", "--set", "workers=many"],
            'error: --set: rollout.workers must be a whole number ≥ 0 or "auto", got "many"',
        ),
        (["--config", "prod.toml", "--set", "a\nb=1"], "error: --set: a b is not a setting"),
    ],
)
def test_an_unusable_setting_is_one_line_and_exit_code_2(arguments, line):
    done = launch_here(*arguments, "--dry-run")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


@pytest.mark.parametrize("arguments", [[], ["prod.toml", "--resume", "--again"]])
def test_a_wrong_command_line_is_answered_with_the_usage(arguments):
    done = launch_here(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch.py")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", 300 * "x"],
        ["--config", "smoke_test.toml", "--set", f"output_dir={300 * 'x'}"],
        ["--config", "smoke_test.toml", "--set", "output_dir=file/run"],
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_path_that_the_system_refuses_is_one_line_and_exit_code_2(arguments, more, tmp_path):
    (tmp_path / "file").touch()
    done = launch_here(*arguments, *more, cwd=tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert (done.returncode, line[:7]) == (2, "error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_process_that_was_launched_as_a_later_rank_looks_for_the_others_and_starts_no_run(tmp_path):
    (tmp_path / "hosts.json").write_text("nobody")
    rank = {"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    done = launch_here("smoke_test", cwd=tmp_path, environment={**os.environ, **rank})
    assert done.returncode == 2
    assert re.fullmatch("error: the ranks cannot meet: .*parse error.*\n", done.stderr)  # MLX reads that file
    assert [path.name for path in tmp_path.iterdir()] == ["hosts.json"]
