"""What counts as silence of a child; the pipe is real, the time an argument."""

import os

import pytest

from grpo_actors.progress import LOADING_S
from grpo_actors.supervisor.watch import Watch


@pytest.fixture
def pipe():
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    yield Watch(read_end), write_end
    os.close(read_end)
    os.close(write_end)


def looks(watch: Watch, *times_s: float) -> float:
    for now_s in times_s:
        watch.look(now_s)
    return watch.silent_s


def test_silence_is_counted_from_the_last_report(pipe):
    watch, write_end = pipe
    assert looks(watch, 10.0, 10.5, 11.0) == 1.0
    os.write(write_end, b"3.0 update 12\n")
    assert looks(watch, 11.5) == 0.0
    assert (watch.work, watch.patience_s) == ("update 12", 3.0)
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
    assert (watch.work, watch.patience_s) == ("", 4.5)


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
