"""A worker that is attached to a run before the run has a learner."""

import subprocess
import sys

import pytest
from bounds import HANG_S

from grpo_actors.rollout.__main__ import main
from grpo_actors.rundir.folder import locked


def test_it_waits_while_the_run_starts_and_ends_with_it(tmp_path):
    command = [sys.executable, "-m", "grpo_actors.rollout", "--attach", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
        with locked(tmp_path):
            assert worker.stderr.readline() == f"{tmp_path}: the run is starting; waiting for its learner\n"
            assert worker.poll() is None
        assert "no run is live here" in worker.stderr.read()
        assert worker.wait(HANG_S) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ranks", "0"], "--ranks: must be at least 1, got 0"),
        (
            ["--ranks", "2", "--device", "1"],
            "--device: not with --ranks; CUDA_VISIBLE_DEVICES names the GPUs",
        ),
    ],
)
def test_ranks_that_cannot_be_are_refused(options, reason, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--attach", str(tmp_path), *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {reason}")
