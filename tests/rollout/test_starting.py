"""A worker that is attached to a run before the run has a learner."""

import subprocess
import sys

from bounds import HANG_S

from grpo_actors.rundir.folder import locked


def test_it_waits_while_the_run_starts_and_ends_with_it(tmp_path):
    command = [sys.executable, "-m", "grpo_actors.rollout", "--attach", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
        with locked(tmp_path):
            assert worker.stderr.readline() == f"{tmp_path}: the run is starting; waiting for its learner\n"
            assert worker.poll() is None
        assert "no run is live here" in worker.stderr.read()
        assert worker.wait(HANG_S) == 2
