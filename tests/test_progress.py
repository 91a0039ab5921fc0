"""How long work may take, and how a process reports it."""

import os
from types import SimpleNamespace

import pytest

from grpo_actors import progress
from grpo_actors.progress import (
    GIVEN_UP,
    LOADING_S,
    LOST_S,
    PROGRESS,
    Pace,
    begin_work,
    given_up,
    report_progress,
    scoring_patience_s,
)


@pytest.mark.parametrize(
    ("steps_s", "patience_s"),
    [
        ([], LOADING_S),  # the first step may compile
        ([300.0], 3000.0),
        ([1.0, 300.0, 2.0], 120.0),  # ten times the median are 20 s
        ([20.0, 60.0, 30.0], 300.0),
    ],
)
def test_a_step_may_take_ten_times_the_median_and_two_minutes(steps_s, patience_s):
    pace = Pace()
    for step_s in steps_s:
        pace.add(step_s)
    assert pace.patience_s == patience_s


def test_a_loop_that_calls_a_reward_may_be_silent_as_long_as_the_reward():
    assert scoring_patience_s(1.0) == LOST_S == 120
    assert scoring_patience_s(200.0) == 205


@pytest.fixture
def pipe(monkeypatch):
    """The read end of the pipe into which this process reports."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    monkeypatch.setenv(PROGRESS, str(write))
    monkeypatch.setattr(progress, "_reporter", progress._Reporter())
    with os.fdopen(read, "rb", buffering=0) as reports:
        yield reports
    os.close(write)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only a test moves."""
    time_s = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: time_s[0]))
    return time_s


def test_work_is_reported_at_once_and_its_progress_ten_times_a_second(pipe, clock):
    begin_work("update 1", 5.0)
    assert pipe.read() == b"5.0 update 1\n"
    report_progress()
    begin_work("update 1", 5.0)
    assert pipe.read() is None
    clock[0] += progress.PERIOD_S
    report_progress()
    assert pipe.read() == b"5.0 update 1\n"
    begin_work("update 1", 6.0)
    begin_work("update 2")
    assert pipe.read() == b"6.0 update 1\n120.0 update 2\n"


def test_progress_without_named_work_may_take_as_long_as_to_load_a_model(pipe, clock):
    report_progress()
    assert pipe.read() == f"{LOADING_S} \n".encode()


def test_the_children_of_a_process_do_not_report_for_it(pipe):
    assert PROGRESS not in os.environ


def test_a_supervisor_that_reads_nothing_or_is_gone_stops_nobody(pipe, clock):
    for number in range(10_000):  # more than a pipe holds
        begin_work(f"update {number}, of which there are very many in this run")
    pipe.close()
    begin_work("the end")


def test_a_process_that_was_started_by_hand_reports_to_nobody(monkeypatch):
    monkeypatch.delenv(PROGRESS, raising=False)
    monkeypatch.setattr(progress, "_reporter", progress._Reporter())
    begin_work("update 1")
    report_progress()


def test_the_work_that_was_given_up_is_one_name_a_line(monkeypatch):
    monkeypatch.setenv(GIVEN_UP, "checkpoint-4\nlease 7, 8\n")
    assert given_up() == {"checkpoint-4", "lease 7, 8"}
    monkeypatch.delenv(GIVEN_UP)
    assert given_up() == frozenset()
