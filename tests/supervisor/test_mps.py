"""Test when a run starts CUDA MPS, and that it ends with the run, with real processes and a stand-in for NVIDIA's program."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bounds import HANG_S
from machines import GB, cpu, cuda, metal
from mps_stand_in import StandIn

from grpo_actors.backend import join_mps
from grpo_actors.config import load_config
from grpo_actors.supervisor import mps as module
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.mps import Mps, is_provided, mps_helps

#: A process that holds MPS as the supervisor does, until its standard input closes.
HOLDER = """
import sys
from grpo_actors.supervisor.allocation import allocate
from grpo_actors.supervisor.mps import Mps
with Mps(starts=True) as mps:
    print(mps.folder(gives_up=lambda: False), flush=True)
    sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA MPS is for Linux")


@pytest.fixture
def stand_in(request, tmp_path_factory, monkeypatch) -> StandIn:
    """The stand-in on PATH, of the kind that the test's parameter names."""
    folder = tmp_path_factory.mktemp("m")
    made = StandIn(folder, getattr(request, "param", "works"))
    monkeypatch.setenv("PATH", made.path)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return made


def of_kind(*kinds):
    return pytest.mark.parametrize("stand_in", kinds, indirect=True)


def wait_until_gone(stand_in: StandIn) -> None:
    """Wait until the daemon and its folder are gone."""
    deadline_s = time.monotonic() + HANG_S
    while is_alive(stand_in.daemon["pid"]) or Path(stand_in.daemon["folder"]).exists():
        assert time.monotonic() < deadline_s, "the daemon or its folder is left"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def never() -> bool:
    return False


@pytest.mark.parametrize(("given", "of_the_server"), [("2", None), ("GPU-1", "GPU-1")])
def test_clients_may_connect_when_the_server_is_active_and_nothing_is_left_afterwards(
    stand_in, monkeypatch, given, of_the_server
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with Mps(starts=True) as mps:
        folder = mps.folder(never)
        assert mps.reason == ""
        assert is_alive(stand_in.daemon["pid"])
    # The server sees all GPUs, so that a client's own number 2 stays right.
    expected = {
        "folder": folder,
        "mode": 0o700,
        "CUDA_MPS_LOG_DIRECTORY": folder,
        "CUDA_VISIBLE_DEVICES": of_the_server,
    }
    assert stand_in.daemon == {"pid": stand_in.daemon["pid"], **expected}
    look = ["get_server_list", "get_server_status 4242"]
    assert stand_in.asked == [f"start_server -uid {os.getuid()}", *look, *look, "quit -t 2"]
    wait_until_gone(stand_in)


def test_mps_ends_when_the_supervisor_is_killed(stand_in):
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == stand_in.daemon["folder"]
        holder.kill()
    wait_until_gone(stand_in)
    assert stand_in.asked[-1] == "quit -t 2"


def test_mps_ends_when_the_supervisor_is_killed_before_it_is_up(stand_in):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        while not stand_in.started:
            assert holder.poll() is None
            time.sleep(0.001)
        holder.kill()
    wait_until_gone(stand_in)


@of_kind("stubborn")
def test_a_daemon_that_does_not_quit_is_killed(stand_in):
    with Mps(starts=True) as mps:
        assert mps.folder(never)
    wait_until_gone(stand_in)


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        ("refuses", "nvidia-cuda-mps-control ended with 1: An instance of this daemon is already running"),
        ("no server", "its server cannot start"),
        ("fault", "its server cannot start"),
    ],
    indirect=["stand_in"],
)
def test_a_daemon_that_does_not_come_up_is_ended_and_the_reason_told(stand_in, reason):
    with Mps(starts=True) as mps:
        assert mps.folder(never) == ""
        assert mps.reason == reason
        wait_until_gone(stand_in)


def test_ctrl_c_ends_the_wait(stand_in):
    with Mps(starts=True) as mps:
        assert mps.folder(gives_up=lambda: True) == ""
        assert mps.reason == ""


def test_a_program_of_nvidia_that_cannot_be_run_is_named(stand_in):
    (stand_in.folder / "nvidia-cuda-mps-control").write_text("#!/nowhere/python")
    with Mps(starts=True) as mps:
        assert mps.folder(never) == ""
        assert mps.reason == "nvidia-cuda-mps-control cannot be run (No such file or directory)"


@pytest.mark.usefixtures("stand_in")
def test_a_keeper_that_crashes_is_done_without():
    with Mps(starts=True) as mps:
        mps._keeper.kill()
        assert mps.folder(never) == ""
        assert mps.reason == "its keeper crashed"


@pytest.mark.usefixtures("stand_in")
def test_a_keeper_that_does_not_answer_is_done_without_and_killed(monkeypatch):
    for name in ("START_S", "END_S"):
        monkeypatch.setattr(module, name, 0.0)
    with Mps(starts=True) as mps:
        mps._keeper.send_signal(signal.SIGSTOP)
        assert mps.folder(never) == ""
        assert mps.reason == "its keeper does not answer"
    assert mps._keeper.returncode == -signal.SIGKILL


def test_a_run_that_starts_no_mps_has_none():
    with Mps(starts=False) as mps:
        assert (mps.folder(never), mps.reason) == ("", "")


def test_without_nvidias_program_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with Mps(starts=True) as mps:
        assert mps.folder(never) == ""
        assert mps.reason == "nvidia-cuda-mps-control is not on PATH"


def test_a_temporary_folder_with_a_long_path_is_named(stand_in, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with Mps(starts=True) as mps:
        assert mps.folder(never) == ""
        assert mps.reason.endswith("is too long for sockets; set TMPDIR to a shorter folder")
    assert list(long.iterdir()) == []
    assert not stand_in.started


def test_a_worker_started_by_hand_joins_the_mps_of_its_run_unless_it_has_another(monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "restored after the test")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")
    found = []
    for folder in ("", "/run", "/other"):
        join_mps(folder)
        found.append(os.environ.get("CUDA_MPS_PIPE_DIRECTORY"))
    assert found == [None, "/run", "/run"]


@pytest.mark.parametrize(
    ("settings", "machine", "starts"),
    [
        (["workers=1", "eval_every_updates=0"], cuda(80 * GB), True),
        (["workers=auto", "eval_every_updates=0"], cuda(80 * GB), True),
        (["workers=0", "eval_every_updates=10"], cuda(80 * GB), True),
        (["workers=0", "eval_every_updates=0"], cuda(80 * GB), False),  # the learner alone
        (["workers=3", "cuda_mps=false"], cuda(80 * GB), False),
        (["workers=1"], cuda(80 * GB, 80 * GB, 80 * GB), False),  # one on each
        (["workers=3"], cuda(80 * GB, 80 * GB, 80 * GB), True),
        (["workers=3"], cpu(), False),
        (["workers=3"], metal(), False),
    ],
)
def test_mps_is_for_several_processes_on_one_gpu(settings, machine, starts, monkeypatch):
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    config = load_config(None, ["task=arithmetic", *settings]).config
    assert mps_helps(config, allocate(config, machine).placement) is starts


def test_mps_of_the_user_or_of_the_system_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    assert not is_provided(tmp_path)
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as daemon:
            daemon.bind(str(tmp_path / "control"))
            daemon.listen()
            assert is_provided(tmp_path)
        assert not is_provided(tmp_path)  # the socket of a daemon that is gone
        (tmp_path / "control").unlink()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/mine")
    assert is_provided(tmp_path)
