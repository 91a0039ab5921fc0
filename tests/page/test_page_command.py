"""`grpo watch --web` and its address, without a browser."""

import base64
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from bounds import HANG_S
from recorded import RecordedRun, record_run

pytest.importorskip("bokeh", reason="needs the extra: pip install 'grpo-actors[page]'")

from grpo_actors.errors import DataError, RunError
from grpo_actors.page.run_reader import RunReader

COMMAND = [sys.executable, "-m", "grpo_actors", "watch", "--web"]


@contextmanager
def served(*arguments: Path | str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The command on these folders, with options: its address and its process."""
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def get(address: str, path: str = "", host: str | None = None) -> tuple[int, str]:
    parts = urlsplit(address)
    with closing(http.client.HTTPConnection(parts.netloc, timeout=HANG_S)) as connection:
        connection.request("GET", parts.path + path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> "Iterator[tuple[str, subprocess.Popen[str]]]":
    with served(record_run(tmp_path_factory.mktemp("runs") / "first")) as served_page:
        yield served_page


@pytest.fixture(scope="module")
def address(page) -> str:
    return page[0]


def test_the_address_is_of_this_host_and_holds_a_token(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", address)
    assert get(address)[0] == 200


def test_without_the_token_there_is_nothing(address):
    root = f"http://{urlsplit(address).netloc}/"
    assert [get(root, path)[0] for path in ("", "view", "wrong/", "page.js")] == [404] * 4


def test_a_foreign_name_for_this_host_is_refused(address):
    assert get(address, host="evil.example")[0] == 400


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the priority of each thread")
def test_a_run_on_the_same_cores_comes_first(page):
    address, process = page
    assert get(address)[0] == 200
    threads = [int(thread.name) for thread in Path(f"/proc/{process.pid}/task").iterdir()]
    nice = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    assert len(threads) > 1
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {nice}


def test_the_page_names_no_other_host(address):
    text = get(address)[1]
    assert set(re.findall(r"(?:src|href)=\"(\w+:)?//", text)) == set()


def test_a_view_has_curves_score_and_alarm(address):
    view = json.loads(get(address, "view?run=0")[1])
    assert (view["summary"]["state"], view["summary"]["update"]) == ("ended", 40)
    assert re.fullmatch(
        r"accuracy, (greedy|sampled at temperature \S+), [\d,]+ held-out problems", view["summary"]["measure"]
    )
    assert view["scores"][-1] | {"by_source": None} == {
        "update": 40,
        "checkpoint": "checkpoint-40",
        "best": True,
        "by_source": None,
        "value": 0.8,
        "low": pytest.approx(0.75),
        "high": pytest.approx(0.85),
    }
    assert view["alarms"][0]["name"] == "truncated"
    assert {"reward_mean", "rewards/correctness", "kl", "memory/learner"} <= set(view["curves"]["mean"])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *(("samples?reward_min=high", 400), ("samples/9999", 400), ("view?first=x", 400)),
        *((f"view?run={run}", 404) for run in ("1", "-1", "x", "")),
    ],
)
def test_a_wrong_address_is_one_answer_and_not_a_crash(address, path, status):
    assert get(address, path)[0] == status
    assert get(address)[0] == 200


def test_each_answer_keeps_the_page_to_itself(address):
    parts = urlsplit(address)
    for path in ("", "view", "page.js", "samples/9999", "nothing"):
        with closing(http.client.HTTPConnection(parts.netloc, timeout=HANG_S)) as connection:
            connection.request("GET", parts.path + path)
            headers = dict(connection.getresponse().getheaders())
        assert headers["content-security-policy"].startswith("default-src 'none'; ")
        assert {headers[f"x-{name}"] for name in ("frame-options", "content-type-options")} == {
            "DENY",
            "nosniff",
        }
        assert (headers["cache-control"], headers["referrer-policy"]) == ("no-store", "no-referrer")


def test_the_page_has_its_script_its_style_and_its_samples(address):
    found = {name: get(address, name) for name in ("page.js", "page.css", "bokeh.min.js")}
    assert {status for status, _ in found.values()} == {200}
    assert "Bokeh" in found["bokeh.min.js"][1]
    listed = json.loads(get(address, "samples?update_max=2")[1])
    assert (listed["matching"], listed["unit"]) == (4, "tokens")
    group = json.loads(get(address, f"samples/{listed['groups'][0]['id']}")[1])
    assert (group["update"], group["problem"]) == (2, "add-2-1")
    assert "must be a number" in json.loads(get(address, "samples?reward_min=high")[1])["error"]


def test_a_part_of_the_curves_can_be_asked_for(address):
    def updates(path: str) -> int:
        return len(base64.b64decode(json.loads(get(address, path)[1])["curves"]["x"])) // 4

    assert [updates(f"view?{part}") for part in ("", "first=31", "last=5", "first=3&last=5")] == [
        40,
        10,
        5,
        3,
    ]


def test_a_run_that_cannot_be_read_is_one_line_and_has_no_samples(run_dir):
    reader = RunReader(record_run(run_dir, updates=1), lambda: None)
    with pytest.raises(DataError, match="has no samples yet, got position 0"):
        reader.group(0)
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    with closing(reader), pytest.raises(RunError, match=r"cannot be read: .*Is a directory"):
        reader.start()
    assert "cannot be read" in reader.view()["summary"]["why"]


def test_ctrl_c_ends_it_without_an_error_even_while_a_browser_listens(run_dir):
    with served(record_run(run_dir, updates=1)) as (address, process):
        parts = urlsplit(address)
        with closing(http.client.HTTPConnection(parts.netloc, timeout=HANG_S)) as listening:
            listening.request("GET", f"{parts.path}events")
            with listening.getresponse() as events:
                assert events.readline().startswith(b"data:")
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=HANG_S)
        assert (process.returncode, errors) == (0, "")


def test_a_browser_is_opened_with_the_address_if_asked_for(run_dir, tmp_path, monkeypatch):
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    os.mkfifo(opened)
    browser.write_text(f"#!/bin/sh\necho \"$1\" > '{opened}'\n")
    browser.chmod(0o700)
    monkeypatch.setenv("BROWSER", str(browser))
    # Open for writing, too: a pipe that nobody has opened for writing may count as ended.
    with (
        os.fdopen(os.open(opened, os.O_RDWR), "rb", buffering=0) as pipe,
        served(record_run(run_dir, updates=1), "--open") as (address, _),
    ):
        assert select.select([pipe], [], [], HANG_S)[0]
        assert pipe.read(1000).decode() == f"{address}\n"


def refused(*arguments: str) -> str:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    return line


def test_a_folder_without_a_run_is_one_line(tmp_path):
    assert "no run has started there" in refused(str(tmp_path))
    assert "is not there" in refused(str(tmp_path / "none"))


def test_a_port_that_is_taken_is_one_line(run_dir):
    run = RecordedRun(run_dir)
    run.close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port: 127.0.0.1:{port} cannot be used" in refused(str(run_dir), "--port", str(port))
