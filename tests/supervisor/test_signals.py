"""What asks a run to stop, and what pauses it with its children."""

import os
import signal
import subprocess
import sys
import time

import pytest
from bounds import HANG_S

from grpo_actors.supervisor.signals import Signals

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of this process, which each test may change."""
    former = {number: signal.getsignal(number) for number in STOPPING}
    yield former
    for number, handler in former.items():
        signal.signal(number, handler)


def counts(signals, *numbers):
    """Return the count after each signal."""
    found = []
    for number in numbers:
        signal.raise_signal(number)
        found.append(signals.count)
    return found


def test_each_ctrl_c_counts_and_a_closed_terminal_only_as_the_first(handlers):
    first, second = Signals(), Signals()
    with first.counted():
        assert counts(first, signal.SIGHUP, signal.SIGHUP, signal.SIGINT, signal.SIGHUP) == [1, 1, 2, 2]
    with second.counted():
        assert counts(second, signal.SIGTERM, signal.SIGINT) == [1, 2]
    assert {number: signal.getsignal(number) for number in STOPPING} == handlers


def test_a_run_that_is_to_outlive_its_terminal_does(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # as a shell without job control does
    signals = Signals()
    with signals.counted():
        assert counts(signals, signal.SIGHUP, signal.SIGTSTP) == [0, 0]


#: A process with a child; it answers each line with the number of requests to stop.
PARENT = """
import os, sys
from grpo_actors.supervisor.children import Actor
from grpo_actors.supervisor.signals import Signals
signals = Signals()
child = Actor("child", ["timeit", "-n1", "-r1", "import time; time.sleep(600)"], {}, respawns=False)
child.start(os.pipe()[0])
signals.family = lambda: [child]
with signals.counted():
    print(child.process.pid, flush=True)
    for line in sys.stdin:
        print(signals.count, flush=True)
child.kill()
child.process.wait()
"""


def test_ctrl_z_stops_the_children_too_and_all_go_on_together():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
        text=True,
    ) as parent:
        child = int(parent.stdout.readline())
        for _ in range(2):
            parent.send_signal(signal.SIGTSTP)
            _, status = os.waitpid(parent.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            until_stopped(child, True)
            parent.send_signal(signal.SIGCONT)
            until_stopped(child, False)
            print(file=parent.stdin, flush=True)
            assert parent.stdout.readline() == "0\n"


def until_stopped(pid, stopped):
    """Wait until a process is stopped, or runs."""
    deadline_s = time.monotonic() + HANG_S
    while True:
        listed = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=True
        )
        if listed.stdout.startswith("T") == stopped:
            return
        assert time.monotonic() < deadline_s
