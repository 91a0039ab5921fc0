"""What is watched: whether a run can still say something, and what is left when nobody watches any more."""

import json
import os
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_actors import targets
from grpo_actors.errors import RunError
from grpo_actors.observe.records import encode, make_record
from grpo_actors.rundir.folder import locked
from grpo_actors.targets import RESTART_GRACE_S, RunFolder, check_run_folder, open_target

#: No process has this number: it is larger than any system's largest.
NOBODY = 2**30


@pytest.fixture
def folder():
    # Not tmp_path: on macOS it is longer than the 103 characters that an ipc path may have there.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only a test moves."""
    time_s = [0.0]
    monkeypatch.setattr(targets, "time", SimpleNamespace(monotonic=lambda: time_s[0]))
    return time_s


def listening(folder, name="e", pid=None):
    """Write where a run listens; return the address of its events. Nobody need be there."""
    address = f"ipc://{folder}/{name}"
    endpoints = {"control": "", "weights": "", "events": address, "pid": pid or os.getpid()}
    (folder / "endpoints.json").write_text(json.dumps(endpoints))
    return address


def opened():
    return len(list(Path("/dev/fd").iterdir()))


OVER = "the run is over: its process is gone and left no word why"


def test_a_run_is_over_when_its_process_has_been_gone_for_as_long_as_a_restart_takes(folder, clock):
    listening(folder)
    with closing(RunFolder(folder)) as run:
        clock[0] = 100.0
        assert run.why_over() is None
        listening(folder, pid=NOBODY)
        clock[0] = 100.0 + RESTART_GRACE_S - 1
        assert run.why_over() is None
        clock[0] += 1
        assert run.why_over() == OVER
        listening(folder)
        assert run.why_over() is None, "it is back"


def test_a_run_that_was_over_before_needs_no_wait(folder, clock):
    listening(folder, pid=NOBODY)
    with closing(RunFolder(folder)) as run:
        assert run.why_over() == OVER
    (folder / "endpoints.json").unlink()
    (folder / "metrics.jsonl").touch()
    with closing(RunFolder(folder)) as run:
        assert run.why_over() == OVER


def test_a_run_that_has_no_learner_yet_lives_while_its_lock_is_held(folder, clock):
    with locked(folder), closing(RunFolder(folder)) as run:
        clock[0] = 2 * RESTART_GRACE_S
        assert run.why_over() is None


def test_a_process_of_another_user_is_alive(folder, monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    listening(folder)
    monkeypatch.setattr(os, "kill", refuse)
    with closing(RunFolder(folder)) as run:
        assert run.why_over() is None


def test_the_address_is_followed_where_it_goes_with_one_connection(folder):
    (folder / "metrics.jsonl").write_bytes(encode(make_record(1, 1.0, "start", {})) + b"\n")
    before = opened()
    first = listening(folder)
    with closing(RunFolder(folder)) as run:
        assert run.follower.receive(0.0)["topic"] == "start"
        source, connected = run.follower.source, opened()
        assert source.endpoint == first
        assert run.why_over() is None
        assert run.follower.source is source, "the same address, the same connection"
        second = listening(folder, "second")
        assert run.why_over() is None
        assert (run.follower.source.endpoint, opened()) == (second, connected)
    assert opened() == before


def test_of_an_address_alone_nothing_says_that_the_run_is_over(folder):
    before = opened()
    with closing(open_target(f"ipc://{folder}/e", None)) as run:
        assert opened() > before
        assert run.follower.source.endpoint == f"ipc://{folder}/e"
        assert run.why_over() is None
    assert opened() == before


def test_a_run_that_ends_while_its_address_is_read_has_none(folder):
    path = folder / "endpoints.json"
    os.mkfifo(path)

    def end():
        with path.open("w"):  # both ends are open now: it is being read
            path.unlink()

    (folder / "metrics.jsonl").touch()
    ending = threading.Thread(target=end)
    ending.start()
    with closing(RunFolder(folder)) as run:
        assert run.follower.source is None
    ending.join()


def test_an_address_that_cannot_be_read_is_an_error_and_no_end(folder):
    (folder / "endpoints.json").write_text("{}")
    with pytest.raises(RunError, match=r"endpoints\.json: unreadable"):
        RunFolder(folder)


def test_a_folder_is_watched_if_a_run_has_started_there_or_is_starting(folder):
    with pytest.raises(RunError, match=r"absent is not there; give a run's output folder or an address"):
        open_target(str(folder / "absent"), None)
    with pytest.raises(RunError, match=r"has no endpoints\.json: no run has started there"):
        check_run_folder(folder)
    with locked(folder):
        check_run_folder(folder)
    (folder / "metrics.jsonl").touch()
    check_run_folder(folder)
