"""A disk of a few megabytes, for tests of full and read-only disks: root on Linux can make one, others skip."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A file system in memory, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, megabytes: int) -> None:
        self._remount(f"size={megabytes}m")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    name = f"small-{uuid.uuid4().hex}"  # the folder may be renamed meanwhile
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", name, str(folder)]
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("a small disk can be mounted by root on Linux only")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", name], check=True)
