"""Runs under CUDA MPS: with a stand-in for NVIDIA's program everywhere, with the real one on a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mps_stand_in import StandIn, seems_to_have_cuda
from runs import Run, kill, living, wait_until

from grpo_actors.rollout.__main__ import live_endpoints
from grpo_actors.supervisor.machine import Machine

SETTINGS = {"workers": 1, "eval_every_updates": 0, "save_steps": 0}
VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA MPS is for Linux")


def seemingly_on_cuda(run: Run, kind: str) -> StandIn:
    """Let a run find MLX for CUDA and a stand-in of NVIDIA's program; MLX itself still computes on the CPU."""
    stand_in = StandIn(run.folder.parent, kind)
    paths = (str(seems_to_have_cuda(run.folder.parent)), run.environment["PYTHONPATH"])
    run.environment |= {"PYTHONPATH": os.pathsep.join(paths), "PATH": stand_in.path}
    run.environment.pop(VARIABLE, None)
    return stand_in


def variable_of(pid: int) -> str | None:
    """Return the folder of MPS in a process's environment, None if it has none (Linux)."""
    path = Path(f"/proc/{pid}/environ")
    if not path.exists():
        pytest.skip("needs /proc")
    return dict(line.split("=", 1) for line in path.read_text().split("\0") if line).get(VARIABLE)


def test_the_children_share_one_mps_which_ctrl_c_ends(make_run):
    run = make_run(**SETTINGS, max_updates=100_000)
    stand_in = seemingly_on_cuda(run, "works")
    run.start()
    wait_until((run.folder / "endpoints.json").exists, f"the learner listens: {run.stderr}")
    folder = stand_in.daemon["folder"]
    assert variable_of(run.child("learner")) == variable_of(run.child("rollout-0")) == folder
    assert live_endpoints(run.folder).mps == folder
    run.signal(signal.SIGINT)
    assert run.end() == 0, run.stderr
    assert stand_in.asked[-1] == "quit -t 2"
    assert living([stand_in.daemon["pid"]]) == set()
    run.assert_nothing_left()


def test_mps_ends_with_a_run_whose_supervisor_is_killed(make_run):
    run = make_run(**SETTINGS)
    stand_in = seemingly_on_cuda(run, "works")
    run.start()
    family = [run.child("learner"), run.child("rollout-0"), stand_in.daemon["pid"]]
    run.signal(signal.SIGKILL)
    wait_until(lambda: not living(family), "the learner, the worker and MPS end")
    wait_until(lambda: not Path(stand_in.daemon["folder"]).exists(), "its folder is removed")


@pytest.mark.slow
def test_a_run_whose_mps_does_not_come_up_says_so_in_a_line_and_goes_on(make_run):
    run = make_run(**SETTINGS, max_updates=1)
    seemingly_on_cuda(run, "refuses")
    run.start()
    assert variable_of(run.child("learner")) is None
    assert run.end() == 0, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if "MPS" in line]
    why = "nvidia-cuda-mps-control ended with 1: An instance of this daemon is already running"
    assert line.startswith(f"no CUDA MPS ({why}): processes on one GPU take turns")
    assert run.updates() == 1
    run.assert_nothing_left()


def clients(folder: str) -> set[int]:
    """Return the processes that use the MPS of a folder, as NVIDIA's program lists them."""

    def ask(command: str) -> list[str]:
        environment = {**os.environ, VARIABLE: folder}
        program = ["nvidia-cuda-mps-control"]
        done = subprocess.run(
            program, env=environment, input=f"{command}\n", capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    return {int(client) for server in ask("get_server_list") for client in ask(f"get_client_list {server}")}


@pytest.mark.gpu
@pytest.mark.skipif(
    Machine.here(asks_gpu=False).back_end != "cuda" or shutil.which("nvidia-cuda-mps-control") is None,
    reason="needs an NVIDIA GPU with MPS",
)
def test_a_worker_that_is_killed_amid_its_kernels_does_not_take_the_run_with_it(make_run):
    run = make_run(**SETTINGS | {"workers": 2, "max_updates": 100_000, "max_new_tokens": 256})
    run.environment.pop(VARIABLE, None)
    run.start()
    # Every kernel may have to be compiled.
    wait_until(lambda: run.updates() >= 2, f"two updates: {run.stderr}")
    folder = json.loads((run.folder / "endpoints.json").read_text())["mps"]
    learner = run.child("learner")
    assert {learner, run.child("rollout-0"), run.child("rollout-1")} <= clients(folder)
    for name in ("rollout-0", "rollout-1", "rollout-0"):
        killed = run.child(name)
        kill(killed)
        run.wait_for_update(run.updates() + 3)
        wait_until(lambda dead=killed, n=name: run.child(n) != dead, f"{name} is started again")
        again = run.child(name)
        wait_until(lambda pid=again: pid in clients(folder), f"{name} uses MPS again")
    assert run.child("learner") == learner
    run.signal(signal.SIGINT)
    assert run.end() == 0, run.stderr
    run.assert_nothing_left()
    assert "CUDA MPS" not in run.stderr
