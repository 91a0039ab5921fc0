"""What a process knows of its group of ranks before they meet (its number, the others' addresses, its GPU), and the others' ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.devices import VISIBLE
from grpo_actors.errors import ConfigError
from grpo_actors.process import EXIT_CRASH, EXIT_RANK_LOST, LIFELINE
from grpo_actors.ranks import processes
from grpo_actors.ranks.processes import (
    HOSTFILE,
    RANK,
    devices_of,
    forget_meeting_points,
    host_of_first,
    launched_rank,
    meeting_point,
    ranks_here,
    started,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A process that nobody has launched as a rank."""
    for name in (*processes._OF_GROUP, VISIBLE):
        monkeypatch.delenv(name, raising=False)


def test_all_ranks_are_processes_of_this_one_unless_it_was_launched_as_one_of_them(monkeypatch):
    assert (launched_rank(), ranks_here(4)) == (None, 4)
    monkeypatch.setenv(RANK, "3")
    assert (launched_rank(), ranks_here(4)) == (3, 1)


@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ({}, "127.0.0.1"),
        ({"MLX_JACCL_COORDINATOR": "10.0.0.7:99"}, "10.0.0.7"),
        ({"MLX_JACCL_COORDINATOR": "10.0.0.7:99", "NCCL_HOST_IP": "10.0.0.6"}, "10.0.0.6"),
    ],
)
def test_rank_0_is_where_each_back_end_of_mlx_looks_for_it(monkeypatch, tmp_path, environment, host):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert host_of_first() == host
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.5:5000", "10.0.1.5:5000"], ["10.0.0.4:5000"]]')
    monkeypatch.setenv(HOSTFILE, str(hosts))
    assert host_of_first() == "10.0.0.5"


def test_a_meeting_point_has_a_port_for_each_rank_and_is_forgotten(monkeypatch):
    monkeypatch.setattr(processes, "cuda_build", lambda: None)
    found = meeting_point(3)
    path = Path(found.pop(HOSTFILE))
    assert found == {}
    hosts = [host for [host] in json.loads(path.read_text())]
    assert len(set(hosts)) == 3
    assert {host.rpartition(":")[0] for host in hosts} == {"127.0.0.1"}
    forget_meeting_points()
    assert not path.exists()
    path = Path(meeting_point(3)[HOSTFILE])
    path.unlink()  # as one who tidies up may
    forget_meeting_points()
    monkeypatch.setattr(processes, "cuda_build", lambda: "mlx_cuda_13")
    found = meeting_point(3)
    assert found.keys() == {"NCCL_HOST_IP", "NCCL_PORT", "MLX_WORLD_SIZE"}
    assert (found["NCCL_HOST_IP"], found["MLX_WORLD_SIZE"]) == ("127.0.0.1", "3")


def test_each_rank_sees_a_gpu_of_its_own_among_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(processes, "cuda_build", lambda: None)
    assert devices_of(2, "ranks") == [{}, {}]
    monkeypatch.setattr(processes, "cuda_build", lambda: "mlx_cuda_13")
    assert devices_of(2, "ranks") == [{VISIBLE: "0"}, {VISIBLE: "1"}]
    monkeypatch.setenv(VISIBLE, "5,GPU-1,7")
    assert devices_of(2, "ranks") == [{VISIBLE: "5"}, {VISIBLE: "GPU-1"}]
    assert devices_of(3, "ranks")[2] == {VISIBLE: "7"}
    with pytest.raises(
        ConfigError, match=r"ranks: must be at most the number of GPUs, got 4 and .*=5,GPU-1,7"
    ):
        devices_of(4, "ranks")


# --- the other ranks as processes -----------------------------------------------------------------

#: A rank that notes what it was given, and leaves when it may.
NOTES = """
import json, os, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["MLX_RANK"]
os.fstat(int(os.environ["GRPO_ACTORS_LIFELINE"]))
draft = folder / f"{rank}.tmp"
draft.write_text(json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:], **os.environ}))
draft.rename(folder / f"{rank}.json")
while not (folder / "over").exists():
    time.sleep(0.01)
(folder / f"{rank}.left").touch()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Return what each other rank of three has noted, once all have."""
    (tmp_path / "notes.py").write_text(NOTES)
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(processes, "cuda_build", lambda: None)
    monkeypatch.setenv(VISIBLE, "5,6,7")

    def read() -> list[dict]:
        files = [tmp_path / f"{rank}.json" for rank in (1, 2)]
        deadline_s = time.monotonic() + HANG_S
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline_s, "a rank has not started"
            time.sleep(0.01)
        return [json.loads(file.read_text()) for file in files]

    return read


def test_the_other_ranks_are_processes_of_this_one_which_waits_for_them(notes, tmp_path, monkeypatch):
    for name in processes._OF_FIRST:
        monkeypatch.setenv(name, "of rank 0 alone")
    monkeypatch.setenv(RANK, "3")  # of another group, whose learner this is
    opened = open_files()
    with started(3, ["notes", str(tmp_path)], "ranks"):
        found = notes()
        hosts = Path(os.environ[HOSTFILE])
        assert len(json.loads(hosts.read_text())) == 3
        assert os.environ[RANK] == "0"
        (tmp_path / "over").touch()
    assert [each[RANK] for each in found] == ["1", "2"]
    for each in found:
        assert each[HOSTFILE] == str(hosts)
        assert each["arguments"] == [str(tmp_path)]
        assert each.keys().isdisjoint(processes._OF_FIRST)
    assert sorted(path.name for path in tmp_path.glob("*.left")) == ["1.left", "2.left"]
    assert os.environ[RANK] == "3"
    assert HOSTFILE not in os.environ
    assert not hosts.exists()
    assert open_files() == opened


def open_files():
    return len(list(Path("/dev/fd").iterdir()))


def test_each_rank_sees_one_gpu_of_cuda(notes, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "cuda_build", lambda: "mlx_cuda_13")
    with started(3, ["notes", str(tmp_path)], "ranks"):
        found = notes()
        assert [os.environ[VISIBLE], *(each[VISIBLE] for each in found)] == ["5", "6", "7"]
        assert {each["NCCL_PORT"] for each in found} == {os.environ["NCCL_PORT"]}
        (tmp_path / "over").touch()


def test_a_failure_of_rank_0_ends_the_others_at_once(notes, tmp_path):
    found = []

    def fails():
        with started(3, ["notes", str(tmp_path)], "ranks"):
            found.extend(notes())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    for each in found:
        with pytest.raises(ProcessLookupError):
            os.kill(each["pid"], 0)
        assert not Path(each[HOSTFILE]).exists()
    assert os.environ.keys().isdisjoint((RANK, HOSTFILE))


def test_one_rank_needs_no_other():
    before = dict(os.environ)
    with started(1, ["no_such_module"], "ranks"):
        assert dict(os.environ) == before


#: Rank 0 of three. The last one is stopped, and so cannot end by itself; then rank 1 or rank 0 ends.
ENDS = """
import os, signal, sys, time
from pathlib import Path
from grpo_actors.process import leave
from grpo_actors.ranks import processes
from grpo_actors.ranks.processes import started
processes.cuda_build = lambda: None
folder, who, how = sys.argv[1:]
stopped = Path(folder, "stopped")
if os.environ.get("MLX_RANK") == "2":
    stopped.touch()
    os.kill(os.getpid(), signal.SIGSTOP)
def end():
    while not stopped.exists():
        time.sleep(0.01)
    leave(int(how)) if int(how) >= 0 else os.kill(os.getpid(), -int(how))
if os.environ.get("MLX_RANK") != "1":
    with started(3, ["ends", folder, who, how], "ranks"):
        end() if who == "0" else time.sleep(600)
else:
    end() if who == "1" else time.sleep(600)
"""


@pytest.mark.parametrize(
    ("ends", "code", "line"),
    [
        ("1 1", 1, ""),  # it has said why
        ("1 0", EXIT_CRASH, "rank 1 has left\n"),
        ("1 -9", EXIT_CRASH, "rank 1 was ended by signal 9\n"),
        ("1 -9 supervised", EXIT_RANK_LOST, "rank 1 was ended by signal 9\n"),
        ("0 5", 5, ""),
    ],
)
def test_all_ranks_end_with_the_first_one_that_does(tmp_path, ends, code, line):
    (tmp_path / "ends.py").write_text(ENDS)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    path = f"{Path.cwd()}{os.pathsep}{tmp_path}"
    # Its output ends when all who have it have ended.
    done = subprocess.run(
        [sys.executable, "-m", "ends", str(tmp_path), *ends.split()[:2]],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)}
        | ({LIFELINE: "0"} if "supervised" in ends else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stderr, done.stdout) == (code, line, "")
    assert list(temporary.iterdir()) == []
