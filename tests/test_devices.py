"""Test which GPUs are found: what nvidia-smi prints, and what CUDA_VISIBLE_DEVICES leaves of it."""

import os
import sys
from dataclasses import replace

import pytest

from grpo_actors.devices import (
    Device,
    back_end,
    environment_of,
    find_gpus,
    own_device,
    use_device,
    visible_gpus,
)
from grpo_actors.errors import ConfigError

#: Recorded: nvidia-smi --query-gpu=index,uuid,memory.total --format=csv,noheader,nounits
LISTING = """\
0, GPU-1f0d2c9e-7c2f-4a57-b7f7-0c4c8a3f9a10, 143771
1, GPU-1f0d77b1-90cb-4a58-8c69-6a2a2a0de1c4, 143771
2, GPU-9a3be4c0-3d51-4c0d-9f6f-52f1f4b5a0aa, 81559
"""
ROWS = [line.split(", ") for line in LISTING.splitlines()]
UUIDS = [row[1] for row in ROWS]
MIB = 2**20


def gpu(number, row):
    return Device("cuda", number, int(ROWS[row][2]) * MIB, UUIDS[row])


@pytest.mark.parametrize(
    ("visible", "rows"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        (f"{UUIDS[1]}, 2", [1, 2]),
        ("GPU-9a3", [2]),
        ("1,-1,0", [1]),  # CUDA stops at the first that is none
        ("", []),
    ],
)
def test_gpus_are_numbered_as_the_variable_orders_them(visible, rows):
    assert visible_gpus(ROWS, visible) == tuple(gpu(number, row) for number, row in enumerate(rows))


def test_what_nvidia_smi_does_not_list_keeps_its_name_and_has_no_known_memory():
    part = Device("cuda", 0, None, "MIG-4f5e")
    assert visible_gpus(ROWS, "MIG-4f5e,1") == (part, gpu(1, 1))
    assert visible_gpus([], "1") == (Device("cuda", 0, None, "1"),)
    # The beginning of two UUIDs names neither.
    assert visible_gpus(ROWS, "GPU-1f0d")[0].memory_bytes is None
    assert visible_gpus([["0", "MIG-4f5e", "1"], ["0", UUIDS[0]]], None) == (), "no lines about a GPU"
    assert visible_gpus([["0", UUIDS[0], "[N/A]"]], None) == (Device("cuda", 0, None, UUIDS[0]),)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name, with given lines, on PATH."""

    def write(lines):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return write


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (f'[ "$*" = "--query-gpu=index,uuid,memory.total --format=csv,noheader,nounits" ] && printf "{LISTING}"', 3),
        ("echo No devices were found", 0),
        (f'printf "{LISTING}"; exit 9', 0),
    ],
)  # fmt: skip
def test_gpus_are_asked_of_nvidia_smi(program, expected, nvidia_smi):
    nvidia_smi(program)
    assert len(find_gpus()) == expected


def test_nvidia_smi_is_asked_about_the_visible_gpus_only(nvidia_smi, monkeypatch):
    nvidia_smi(f'[ "$1" = "--id=1" ] && printf "{LISTING.splitlines()[1]}"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    # The only one needs no name: all processes of a run see it alone.
    assert find_gpus() == (replace(gpu(0, 1), identifier=""),)


def test_each_of_two_gpus_has_its_name(nvidia_smi):
    nvidia_smi(f'printf "{"".join(LISTING.splitlines(keepends=True)[:2])}"')
    assert find_gpus() == (gpu(0, 0), gpu(1, 1))


def test_without_nvidia_smi_no_gpu_is_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpus() == ()


def test_a_process_finds_its_gpu_by_uuid_and_knows_its_name():
    one = {"CUDA_VISIBLE_DEVICES": UUIDS[2], "GRPO_ACTORS_DEVICE": "GPU 1"}
    assert environment_of([gpu(1, 2)]) == one
    two = {"CUDA_VISIBLE_DEVICES": f"{UUIDS[0]},{UUIDS[2]}", "GRPO_ACTORS_DEVICE": "GPU 0, GPU 1"}
    assert environment_of([gpu(0, 0), gpu(1, 2)]) == two
    assert environment_of([Device("cuda")]) == {"GRPO_ACTORS_DEVICE": "GPU 0"}
    assert environment_of([Device("cpu")] * 2) == {"GRPO_ACTORS_DEVICE": "CPU"}
    assert environment_of([]) == {}


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """An environment with MLX for CUDA."""
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info" / "METADATA").write_text(
        "Name: mlx-cuda-13\nVersion: 0.32.4\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("GRPO_ACTORS_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "restored after the test")
        monkeypatch.delenv(name)


def test_the_device_of_this_process_has_a_name_or_its_uuid(cuda, monkeypatch):
    assert back_end() == "cuda"
    assert own_device() == "GPU 0"
    for visible, name in (("2,1", "GPU 2"), (" GPU-1f0d ,1", "GPU-1f0d")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert own_device() == name
    monkeypatch.setattr(sys, "path", [])  # MLX for CPUs has a distribution of another name
    assert (back_end(), own_device()) == ("cpu", "CPU"), "whatever GPUs are visible"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert (back_end(), own_device()) == ("metal", "Metal")


def test_one_of_several_gpus_is_used_by_its_uuid(cuda, nvidia_smi):
    nvidia_smi(f'printf "{LISTING}"')
    with pytest.raises(ConfigError, match=r"must be one of 0 \(GPU 0\), 1 \(GPU 1\), 2 \(GPU 2\), got 3$"):
        use_device(3)
    use_device(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == UUIDS[1]
    assert own_device() == "GPU 1"


@pytest.mark.parametrize("device", [Device("cpu", 0, 2**34), Device("metal", 0, 2**34), gpu(0, 0)])
def test_most_of_a_device_may_be_used_and_not_all_of_it(device):
    assert device.memory_bytes / 2 < device.usable_bytes < device.memory_bytes
    assert replace(device, memory_bytes=None).usable_bytes is None


def test_a_worker_started_by_hand_chooses_among_the_devices_that_there_are(monkeypatch):
    monkeypatch.setenv("GRPO_ACTORS_DEVICE", "restored after the test")
    monkeypatch.delenv("GRPO_ACTORS_DEVICE")
    with pytest.raises(ConfigError, match=r"--device: must be one of 0 \(\w+( 0)?\).*, got 64"):
        use_device(64)
    with pytest.raises(ConfigError, match="got -1"):
        use_device(-1)
    use_device(0)
    assert own_device() == os.environ["GRPO_ACTORS_DEVICE"]
