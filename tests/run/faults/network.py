"""A second host for the tests: a network namespace, reached through a cable that can be cut. Root on Linux; others skip."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

#: Addresses of the two ends; of the private range that is meant for tests between networks.
HERE, THERE = "198.18.77.1", "198.18.77.2"


class SecondHost:
    """The namespace, and this host's end of the cable."""

    def __init__(self, name: str, cable: str) -> None:
        self._cable = cable
        #: Runs a command there.
        self.within = ("ip", "netns", "exec", name)

    def set_cable(self, state: str) -> None:
        """Plug the cable in (``up``) or out (``down``)."""
        _ip("link", "set", self._cable, state)

    def disturb(self, *how: str) -> None:
        """Delay or drop what is sent there, in the words of netem: ``delay 100ms``, ``loss 5%``."""
        command = ["tc", "qdisc", "replace", "dev", self._cable, "root", "netem", *how]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this kernel has no netem")


@contextmanager
def second_host() -> Iterator[SecondHost]:
    name, cable = f"far{os.getpid()}", f"v{os.getpid()}"
    if (
        shutil.which("ip") is None
        or subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode
    ):
        pytest.skip("a network namespace can be made by root on Linux only")
    try:
        _ip("link", "add", cable, "type", "veth", "peer", "name", "far", "netns", name)
        _ip("addr", "add", f"{HERE}/30", "dev", cable)
        _ip("-n", name, "addr", "add", f"{THERE}/30", "dev", "far")
        _ip("-n", name, "link", "set", "far", "up")
        host = SecondHost(name, cable)
        host.set_cable("up")
        yield host
    finally:
        subprocess.run(["ip", "link", "del", cable], capture_output=True, check=False)
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
