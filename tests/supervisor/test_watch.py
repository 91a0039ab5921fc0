"""What counts as silence of a child; the pipe is real, the time an argument."""

import os
import signal
import subprocess
import sys

import pytest

from grpo_actors.progress import LOADING_S
from grpo_actors.supervisor.watch import IDLE_S, LIVE_S, PERIOD_S, Watch

#: No process has such a number.
NOBODY = 2**22 + 1


@pytest.fixture
def pipe():
    """A watch of which the system tells nothing, and the end of its pipe into which to report."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    watch = Watch(read_end, NOBODY)
    yield watch, write_end
    watch.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read_end)
    os.close(write_end)


def looks(watch: Watch, *times_s: float) -> float:
    for now_s in times_s:
        watch.look(now_s)
    return watch.silent_s


def test_silence_is_counted_from_the_last_report(pipe):
    watch, write_end = pipe
    assert looks(watch, 10.0, 10.5, 11.0) == 1.0
    assert watch.place == " at its start"
    os.write(write_end, b"3.0 update 12\n")
    assert looks(watch, 11.5) == 0.0
    assert (watch.work, watch.patience_s, watch.place) == ("update 12", 3.0, " at update 12")
    assert looks(watch, 12.0, 13.0, 14.0, 14.5) == 3.0
    assert not watch.is_hung
    looks(watch, 14.75)
    assert watch.is_hung


def test_the_last_of_several_reports_counts_and_half_a_report_waits_for_its_end(pipe):
    watch, write_end = pipe
    os.write(write_end, b"3.0 lease 1\n3.0 lease 2\n4.")
    looks(watch, 0.0)
    assert (watch.work, watch.patience_s) == ("lease 2", 3.0)
    os.write(write_end, b"5 \n")
    looks(watch, 0.5)
    assert (watch.work, watch.patience_s, watch.place) == ("", 4.5, "")


def test_a_time_in_which_this_process_did_not_look_is_not_silence(pipe):
    watch, _ = pipe
    # An hour passes between two looks, as when a container is paused: one second of it counts.
    assert looks(watch, 0.0, 3600.0) == 1.0


def test_a_child_that_loads_has_long_and_its_output_is_progress(pipe):
    watch, write_end = pipe
    assert watch.patience_s == LOADING_S
    looks(watch, 0.0, 1.0)
    watch.note_output()
    assert watch.silent_s == 0.0
    os.write(write_end, b"3.0 \n")
    looks(watch, 1.5, 2.5)
    watch.note_output()
    assert watch.silent_s == 1.0, "a hung loop may have a thread that prints"


# --- what a child that loads does ---------------------------------------------------------------------

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what processes do")
#: A child that has computed for as long as shows that it is alive, and then moves 2 MiB for each line that it reads.
MOVING = f"""
import sys, time
while time.process_time() < {2 * LIVE_S}:
    pass
for line in sys.stdin:
    with open("/dev/zero", "rb") as zeros:
        zeros.read(2**21)
    print(flush=True)
"""
#: The same, but its own child does it.
HAVING_MOVED = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {MOVING!r}])"


@pytest.fixture(params=[MOVING, HAVING_MOVED], ids=["itself", "by a child"])
def loading(request, pipe):
    """The watch of a process that does something only when the test asks for it."""
    process = subprocess.Popen(
        [sys.executable, "-c", request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
        text=True,
    )
    watch, write_end = pipe
    watch.group = process.pid

    def move() -> None:
        print(file=process.stdin, flush=True)
        assert process.stdout.readline()

    move()  # it has started
    yield watch, write_end, move
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def second_looks(watch: Watch, first: int, last: int) -> bool:
    looks(watch, *map(float, range(first, last)))
    return watch.is_hung


@LINUX
def test_a_child_that_loads_and_does_nothing_is_hung_long_before_its_time(loading):
    watch, _, move = loading
    assert not second_looks(watch, 0, 100)
    move()
    # Seen at 100 s or, as it is not looked at all the time, PERIOD_S later.
    assert not second_looks(watch, 100, 220)
    assert second_looks(watch, 220, 222 + int(PERIOD_S))
    assert watch.limit_s == IDLE_S
    watch.note_output()
    assert watch.is_hung, "these are the stacks of its threads"


@LINUX
def test_a_report_and_output_are_signs_of_life_too(loading):
    watch, write_end, _ = loading
    second_looks(watch, 0, 100)
    watch.note_output()
    assert not second_looks(watch, 100, 200)
    os.write(write_end, f"{LOADING_S} \n".encode())
    assert not second_looks(watch, 200, 300)
    assert second_looks(watch, 300, 325)


@LINUX
@pytest.mark.parametrize("report", [f"{LOADING_S} update 1\n", "900.0 \n"])
def test_a_child_that_does_not_load_may_wait_for_others(loading, report):
    watch, write_end, _ = loading
    os.write(write_end, report.encode())
    assert not second_looks(watch, 0, 400)
    assert watch.limit_s == watch.patience_s


def test_a_child_of_which_the_system_tells_nothing_has_its_whole_time(pipe):
    watch, _ = pipe
    assert not second_looks(watch, 0, 3 * int(IDLE_S))
