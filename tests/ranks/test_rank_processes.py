"""What a process knows of its group of ranks before they meet: its number, the others' addresses, its GPU."""

import json
from pathlib import Path

import pytest

from grpo_actors.devices import VISIBLE
from grpo_actors.errors import ConfigError
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
