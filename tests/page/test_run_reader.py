"""A run that is read in the background, and the server's side of its page: who is told what, and when."""

import asyncio
import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest
from bounds import HANG_S
from recorded import RecordedRun, record_run

pytest.importorskip("bokeh", reason="needs the extra: pip install 'grpo-actors[page]'")

from grpo_actors.errors import DataError, RunError
from grpo_actors.page import server
from grpo_actors.page.run_reader import GROUPS_LISTED, RunReader
from grpo_actors.page.sample_filter import SampleFilter
from grpo_actors.page.server import Page

EVERYTHING = SampleFilter()


def test_all_that_is_there_has_been_read_when_the_reader_has_started(run_dir):
    with closing(RunReader(record_run(run_dir, updates=3), lambda: None)) as reader:
        assert reader.groups(EVERYTHING) == {
            "groups": [],
            "matching": 0,
            "total": 0,
            "unit": "tokens",
            "reading": False,
        }
        reader.start()
        assert reader.name == "run"
        assert (reader.view()["summary"]["update"], reader.view()["summary"]["state"]) == (3, "ended")
    assert "reader of run" not in [thread.name for thread in threading.enumerate()]


def caught_up(reader: RunReader, changed: threading.Event, groups: int) -> dict:
    """The reader's groups, once there are so many."""
    while (found := reader.groups(EVERYTHING))["total"] < groups or found["reading"]:
        assert changed.wait(HANG_S)
        changed.clear()
    return found


def test_groups_are_listed_newest_first_and_no_more_than_a_list_needs(run_dir):
    changed = threading.Event()
    updates = GROUPS_LISTED // 2 + 1  # of two groups each
    with closing(RunReader(record_run(run_dir, updates=updates), changed.set)) as reader:
        reader.start()
        found = caught_up(reader, changed, 2 * updates)
        assert (found["total"], found["matching"], len(found["groups"])) == (202, 202, 200)
        assert [one["id"] for one in found["groups"][:2]] == [201, 200]
        assert reader.groups(SampleFilter(update_max=1))["matching"] == 2
        assert reader.group(201)["update"] == updates
        with pytest.raises(DataError, match="has 202 groups, got position 202"):
            reader.group(202)


def test_a_run_that_goes_on_is_followed_and_its_samples_get_tokens_once_groups_are_recorded(run_dir):
    changed = threading.Event()
    run = RecordedRun(run_dir, groups=False)
    run.update(1)
    with closing(run), closing(RunReader(run_dir, changed.set)) as reader:
        reader.start()
        assert caught_up(reader, changed, 1)["unit"] == "characters"
        run.update(2)
        assert caught_up(reader, changed, 2)["unit"] == "characters"
        assert reader.view()["summary"]["update"] == 2
        with closing(RecordedRun(run_dir.parent / "other", groups=True)) as other:
            other.update(1)
            (other.folder / "groups.jsonl").rename(run_dir / "groups.jsonl")
        while reader.groups(EVERYTHING)["unit"] == "characters":
            run.alarm(2)  # read with the next look at the files
            assert changed.wait(HANG_S)
            changed.clear()
        assert caught_up(reader, changed, 2)["unit"] == "tokens"


@pytest.fixture
def page(run_dir) -> Page:
    return Page([record_run(run_dir, updates=1), record_run(run_dir.parent / "second", updates=1)])


def test_who_listens_is_told_of_each_run_at_first_and_then_of_changes_until_the_end(page):
    async def listen() -> list[str]:
        async with page._lifespan(page.app()):
            stream = page._stream()
            told = [await anext(stream) for _ in range(2)]
            page._tell(1)
            told.append(await anext(stream))
            page.end_events()
            told += [event async for event in stream]
            return told

    told = asyncio.run(asyncio.wait_for(listen(), HANG_S))
    assert [event[: len('data: {"run": 0')] for event in told] == [
        f'data: {{"run": {run}' for run in (0, 1, 1)
    ]
    assert all(event.endswith("\n\n") for event in told)
    assert not page._listeners
    page._tell(0)  # nobody is there any more


def test_who_listens_for_long_is_told_that_the_connection_stands(page, monkeypatch):
    monkeypatch.setattr(server, "PULSE_S", 0.01)

    async def listen() -> list[str]:
        stream = page._stream()
        told = [await anext(stream) for _ in range(4)]
        await stream.aclose()
        return told

    assert asyncio.run(asyncio.wait_for(listen(), HANG_S))[2:] == [": still here\n\n"] * 2
    assert not page._listeners


def test_no_run_changes_while_the_page_is_made_and_all_go_on_after_a_failure(page):
    def use(runs):
        assert [run.name for run in runs] == ["run", "second"]
        assert all(reader.lock.locked() for reader in page.readers)
        raise DataError("x")

    with pytest.raises(DataError):
        page._shown(use)
    assert not any(reader.lock.locked() for reader in page.readers)
    assert page._shown(lambda runs: str(len(runs))) == "2"


def test_a_port_takes_connections_at_once_and_again_after_a_page_has_ended():
    with server._bound(0) as listening:
        address = listening.getsockname()
        with socket.create_connection(address, HANG_S):
            connection, _ = listening.accept()
            connection.close()  # this side first: the system keeps the port for a while
    with server._bound(address[1]) as listening, pytest.raises(RunError, match=r"--port: .* cannot be used"):
        server._bound(address[1])


@pytest.mark.parametrize(("port", "why"), [(65536, "0-65535"), (-1, "0-65535")])
def test_a_port_that_does_not_exist_is_refused_and_leaves_no_socket(port, why):
    opened = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(
        RunError, match=rf"--port: 127.0.0.1:{port} cannot be used .*{why}.*or 0 for a free one"
    ) as error:
        server._bound(port)
    assert len(list(Path("/dev/fd").iterdir())) == opened
    del error
