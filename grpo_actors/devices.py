"""Find the devices that compute on this machine: the NVIDIA GPUs that this process sees, or the one device of a Mac or a CPU.

GPUs are numbered as CUDA numbers them for a process: 0 is the first of ``CUDA_VISIBLE_DEVICES``, or of all GPUs in the
order of nvidia-smi if it is not set. A child process gets its GPU by UUID, which means the same GPU whatever the
order, and under CUDA MPS. Loads no MLX.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from grpo_actors.errors import ConfigError

BackEnd = Literal["cpu", "cuda", "metal"]

#: Environment variable of CUDA: the GPUs that a process sees.
VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Environment variable: the name of the device on which a process of a run computes.
DEVICE_NAME = "GRPO_ACTORS_DEVICE"
#: Share of a device's memory that all actors on it together may use. The machine's is also that of all other programs; a
#: GPU's is not.
MEMORY_SHARE: dict[BackEnd, float] = {"cpu": 0.75, "metal": 0.75, "cuda": 0.95}
#: Distributions of MLX for CUDA. The one for CPUs has another name and is never installed together with them.
_CUDA_DISTRIBUTIONS = ("mlx-cuda-12", "mlx-cuda-13")
#: Seconds to wait for nvidia-smi.
_NVIDIA_SMI_S = 10.0


@dataclass(frozen=True, slots=True)
class Device:
    """One device that computes."""

    back_end: BackEnd
    #: Its number among those that this process sees.
    number: int = 0
    #: Its memory; on Metal and on a CPU that is the machine's. None if it is not known.
    memory_bytes: int | None = None
    #: The UUID by which CUDA finds it, or what CUDA_VISIBLE_DEVICES says of it; empty: whatever CUDA chooses.
    identifier: str = ""

    @property
    def name(self) -> str:
        """The name that users see: ``GPU 0``, ``Metal`` or ``CPU``."""
        return {"cuda": f"GPU {self.number}", "metal": "Metal", "cpu": "CPU"}[self.back_end]

    @property
    def usable_bytes(self) -> float | None:
        """The part of its memory that all actors on it together may use; None if it is not known."""
        known = self.memory_bytes
        return None if known is None else known * MEMORY_SHARE[self.back_end]


def environment_of(devices: Sequence[Device]) -> dict[str, str]:
    """Return the environment variables of a process that computes on these devices; none for one that computes on none."""
    names = dict.fromkeys(device.name for device in devices)
    identifiers = [device.identifier for device in devices if device.identifier]
    return ({DEVICE_NAME: ", ".join(names)} if names else {}) | (
        {VISIBLE: ",".join(identifiers)} if identifiers else {}
    )


def back_end() -> BackEnd:
    """Return what MLX computes on here, by the distribution of it that is installed."""
    if sys.platform == "darwin":
        return "metal"
    return "cuda" if any(_is_installed(name) for name in _CUDA_DISTRIBUTIONS) else "cpu"


def find_gpus() -> tuple[Device, ...]:
    """Return the NVIDIA GPUs that this process sees, in CUDA's order; none if nvidia-smi does not list them."""
    found = visible_gpus(nvidia_smi("--query-gpu=index,uuid,memory.total"), os.environ.get(VISIBLE))
    # A child need not be told of the only one, which it sees as this process does.
    return found if len(found) > 1 else tuple(replace(device, identifier="") for device in found)


def visible_gpus(rows: Sequence[Sequence[str]], visible: str | None) -> tuple[Device, ...]:
    """Return the GPUs that a process sees.

    Args:
        rows: Index, UUID and MiB of each GPU, as nvidia-smi prints them.
        visible: CUDA_VISIBLE_DEVICES; None if it is not set. A part of a GPU (MIG) is in no row: its memory is unknown.
    """
    listed = [row for row in rows if len(row) == 3 and row[1].startswith("GPU-")]
    if visible is None:
        found = [(uuid, mebibytes) for _, uuid, mebibytes in listed]
    else:
        found = []
        for word in map(str.strip, visible.split(",")):
            if not word or word.startswith("-"):
                break  # for CUDA, too, the list ends here
            # The beginning of a UUID is enough for CUDA.
            known = [row for row in listed if row[0] == word or row[1].startswith(word)]
            found.append((known[0][1], known[0][2]) if len(known) == 1 else (word, ""))
    return tuple(
        Device("cuda", number, int(mebibytes) * 2**20 if mebibytes.isdigit() else None, identifier)
        for number, (identifier, mebibytes) in enumerate(found)
    )


def nvidia_smi(query: str) -> list[list[str]]:
    """Return the lines of one query on the GPUs that this process sees, cut into cells; none if nvidia-smi fails."""
    visible = os.environ.get(VISIBLE)
    command = [
        "nvidia-smi",
        *([f"--id={visible}"] if visible else []),
        query,
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_S)
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]


def use_device(number: int) -> None:
    """Let this process compute on one of the GPUs that it sees. Call it before MLX is imported.

    Raises:
        ConfigError: There is no such device.
    """
    devices = find_gpus() if back_end() == "cuda" else ()
    devices = devices or (Device(back_end()),)
    if not 0 <= number < len(devices):
        raise ConfigError(f"--device: must be one of {numbers(devices)}, got {number}")
    os.environ.update(environment_of([devices[number]]))


def numbers(devices: Sequence[Device]) -> str:
    """List devices with their numbers for a message: ``0 (GPU 0), 1 (GPU 1)``."""
    return ", ".join(f"{device.number} ({device.name})" for device in devices)


def own_device() -> str:
    """Return the name of the device on which this process computes; that of a GPU set by UUID is the UUID (``GPU-1f0d…``)."""
    if name := os.environ.get(DEVICE_NAME):
        return name
    found = Device(back_end())
    first = os.environ.get(VISIBLE, "").partition(",")[0].strip()
    if found.back_end != "cuda" or not first:
        return found.name
    return f"GPU {first}" if first.isdigit() else first


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
