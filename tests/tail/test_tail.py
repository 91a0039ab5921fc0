"""`python -m grpo_actors.tail` as a process, on real runs: folders, sockets, pipes, a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from bounds import HANG_S
from commands import run_here

from grpo_actors.observe.sinks import Journal
from grpo_actors.rundir.folder import locked
from grpo_actors.tail.__main__ import main
from grpo_actors.targets import RunFolder
from grpo_actors.transport.events import EventPublisher

COMMAND = [sys.executable, "-m", "grpo_actors.tail"]
#: Output in a buffer, as users have it: what a closed pipe has not taken is still there at exit.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: on macOS it is longer than the 103 characters that an ipc path may have there.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


class LiveRun:
    """A run that lives in this process: a publisher, a journal, and endpoints.json."""

    def __init__(
        self, folder: Path, context: "zmq.Context[zmq.Socket[bytes]]", *, log_jsonl: bool = True
    ) -> None:
        self.publisher = EventPublisher(context, f"ipc://{folder}/e")
        self.journal = Journal(folder, publish=self.publisher.publish, log_jsonl=log_jsonl)
        write_endpoints(folder, self.publisher.endpoint, os.getpid())

    def update(self, number: int) -> None:
        fields = {"update": number, "total_updates": 9, "reward_mean": 0.5, "loss": 0.1}
        self.journal.append("metrics", fields)

    def stop(self) -> None:
        self.journal.append("stop", {"reason": "done", "exit_code": 0})


@contextmanager
def live_run(folder: Path, *, log_jsonl: bool = True) -> Iterator[LiveRun]:
    with zmq.Context() as context:
        run = LiveRun(folder, context, log_jsonl=log_jsonl)
        with run.publisher, run.journal:
            yield run


def write_endpoints(folder: Path, events: str, pid: int) -> None:
    endpoints = {"control": "", "weights": "", "events": events, "pid": pid}
    (folder / "endpoints.json").write_text(json.dumps(endpoints))


def test_it_waits_for_a_run_that_has_no_learner_yet(folder):
    with (
        locked(folder),
        subprocess.Popen([*COMMAND, folder, "--json"], stdout=subprocess.PIPE, text=True) as watcher,
    ):
        # Written into an empty folder, in the order of a run's start; the watcher began before, between or after.
        with live_run(folder) as run:
            run.update(1)
            run.stop()
            topics = [json.loads(line)["topic"] for line in watcher.stdout]
        assert (topics, watcher.wait(HANG_S)) == (["metrics", "stop"], 0)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def ended_run(folder: Path, *, with_stop: bool = True) -> None:
    with live_run(folder) as run:
        run.journal.append("start", {"run_name": "r", "total_updates": 9})
        run.update(1)
        run.journal.append("sample", {"update": 1, "completions": [{"text": "seven", "reward": 1.0}]})
        if with_stop:
            run.stop()
    write_endpoints(folder, f"ipc://{folder}/e", dead_pid())


def tail(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=HANG_S, check=False
    )


@contextmanager
def tailing(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [*COMMAND, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=BUFFERED, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], HANG_S)
    assert ready, "no line came"
    return process.stdout.readline()


def test_an_ended_run_is_printed_completely_as_json_and_the_command_ends(folder):
    ended_run(folder)
    result = tail(folder, "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["topic"] for record in records] == ["start", "metrics", "sample", "stop"]
    assert records[2]["completions"] == [{"text": "seven", "reward": 1.0}]
    assert (result.returncode, result.stderr) == (0, "")


def test_an_ended_run_in_a_pipe_is_plain_lines_and_says_that_it_ended(folder):
    ended_run(folder)
    result = tail(folder)
    assert result.stdout.splitlines() == [
        "update 1/9  reward 0.50  loss 0.1000  KL –  len –  –",
        "run ended: done",
    ]
    assert result.returncode == 0


@pytest.mark.parametrize("endpoints", [True, False])
def test_a_run_that_was_killed_says_so(folder, endpoints):
    ended_run(folder, with_stop=False)
    if not endpoints:
        (folder / "endpoints.json").unlink()
    result = tail(folder)
    assert "update 1/9" in result.stdout
    assert result.stdout.splitlines()[-1] == "the run is over: its process is gone and left no word why"
    assert result.returncode == 0


def test_for_a_program_the_end_of_a_killed_run_is_no_record(folder):
    ended_run(folder, with_stop=False)
    done = run_here(main, folder, "--json")
    assert [json.loads(line)["topic"] for line in done.stdout.splitlines()] == ["start", "metrics", "sample"]
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("tail: the run is over: ")


def test_a_run_that_is_no_longer_watched_has_no_file_open(folder):
    def opened():
        return {file.name for file in Path("/dev/fd").iterdir()}

    before = opened()
    with live_run(folder) as run:
        run.update(1)
    (folder / "endpoints.json").unlink()
    target = RunFolder(folder)
    assert target.follower.receive(0.0)["update"] == 1
    assert opened() > before
    target.close()
    assert opened() == before


def test_a_live_run_is_followed_from_its_history_to_its_stop(folder):
    with live_run(folder) as run:
        run.update(1)
        with tailing(folder, "--json") as process:
            assert json.loads(next_line(process))["update"] == 1
            for number in range(2, 9):
                run.update(number)
                assert json.loads(next_line(process))["update"] == number
            run.stop()
            assert json.loads(next_line(process))["topic"] == "stop"
            assert process.wait(HANG_S) == 0


def test_a_run_that_writes_no_files_is_followed_by_its_events(folder):
    with live_run(folder, log_jsonl=False) as run, tailing(folder, "--json") as process:
        assert process.stdout is not None
        # A late subscriber loses what is published before it has connected, so publish until one arrives.
        deadline = time.monotonic() + HANG_S
        while not select.select([process.stdout], [], [], 0.1)[0]:
            assert time.monotonic() < deadline
            run.update(1)
        run.stop()
        assert [json.loads(line)["topic"] for line in process.stdout][-1] == "stop"
        assert process.wait(HANG_S) == 0


def test_an_endpoint_is_followed_without_a_folder(folder):
    with live_run(folder) as run, tailing(run.publisher.endpoint, "--json") as process:
        assert process.stdout is not None
        deadline = time.monotonic() + HANG_S
        while not select.select([process.stdout], [], [], 0.1)[0]:
            assert time.monotonic() < deadline
            run.update(1)
        run.stop()
        assert [json.loads(line)["topic"] for line in process.stdout][-1] == "stop"
        assert process.wait(HANG_S) == 0


def test_a_run_that_moved_to_another_address_is_found_again(folder):
    with live_run(folder) as run, zmq.Context() as context, tailing(folder, "--json") as process:
        run.update(1)
        next_line(process)
        with EventPublisher(context, f"ipc://{folder}/second") as second:
            write_endpoints(folder, second.endpoint, os.getpid())
            with Journal(folder, seq=1, log_jsonl=False, publish=second.publish) as journal:
                deadline = time.monotonic() + HANG_S
                assert process.stdout is not None
                while not select.select([process.stdout], [], [], 0.1)[0]:
                    assert time.monotonic() < deadline
                    journal.append("metrics", {"update": 2})
        assert json.loads(process.stdout.readline())["update"] == 2


def test_a_reader_that_goes_away_ends_it_quietly(folder):
    with live_run(folder) as run, tailing(folder, "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        run.update(1)
        next_line(process)
        process.stdout.close()
        deadline = time.monotonic() + HANG_S
        while process.poll() is None:
            assert time.monotonic() < deadline
            run.update(2)
            select.select([process.stderr], [], [], 0.05)
        assert (process.returncode, process.stderr.read()) == (0, "")


def test_ctrl_c_ends_it_quietly(folder):
    with live_run(folder) as run, tailing(folder, "--json") as process:
        run.update(1)
        next_line(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("missing", "missing is not there; give a run's output folder"),
        ("", "has no endpoints.json: no run has started there"),
        ("nonsense://x", "nonsense://x is no address to connect to"),
    ],
)
def test_a_wrong_target_is_one_clear_line_and_exit_code_2(folder, target, says):
    result = tail(target if "://" in target else folder / target)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"control": "", "weights": "", "events": "ipc:///x", "pid": "1"}']
)
def test_broken_endpoints_are_one_clear_line_and_exit_code_2(folder, content):
    (folder / "endpoints.json").write_text(content)
    result = tail(folder)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"tail: {folder / 'endpoints.json'}: unreadable (")
    assert line.endswith("); start the run anew, or give its address")


def test_on_a_terminal_the_view_is_drawn_and_its_last_state_stays(folder):
    controller, terminal = pty.openpty()
    with live_run(folder) as run:
        run.journal.append("start", {"run_name": "quickstart", "model_name": "tiny", "total_updates": 9})
        run.update(1)
        completions = [{"text": "seven", "reward": 1.0}] * 24  # more than there are lines
        run.journal.append("sample", {"update": 1, "completions": completions})
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        with subprocess.Popen(
            [*COMMAND, str(folder)], stdout=terminal, stderr=terminal, env=environment
        ) as process:
            os.close(terminal)
            shown = read_until(controller, "1/9 updates")
            run.update(2)
            shown += read_until(controller, "2/9 updates")
            run.stop()
            shown += read_until(controller, None)
            assert process.wait(HANG_S) == 0
    os.close(controller)
    last_screen = shown.rsplit("\x1b[?1049l", 1)[1]  # what comes after the alternate screen stays
    assert "quickstart · tiny" in last_screen
    assert "run ended: done" in last_screen
    assert last_screen.count("\n") == 23, "the last of the 24 lines is that of the prompt"


def read_until(terminal: int, words: str | None) -> str:
    """Return the output up to `words`, or until the terminal's last user has closed it."""
    shown = ""
    deadline = time.monotonic() + HANG_S
    while words is None or words not in shown:
        assert time.monotonic() < deadline, f"{words!r} never appeared in {shown!r}"
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed; macOS gives an empty read
            part = b""
        if not part:
            assert words is None, f"it ended before {words!r} appeared"
            return shown
        shown += part.decode(errors="replace")
    return shown


def test_help_needs_no_sockets_no_rich_and_no_back_end():
    code = (
        "import sys\nfrom grpo_actors.tail.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'zmq', 'rich', 'mlx', 'mlx.core', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=HANG_S)


def test_watching_never_loads_the_back_end(folder):
    ended_run(folder)
    code = (
        "import sys\nfrom grpo_actors.tail.__main__ import main\n"
        f"assert main([{str(folder)!r}, '--json']) == 0\n"
        "import grpo_actors.tail.panel\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('mlx', 'numpy')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=HANG_S)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["a", "b"], "one run, or several with --web"),
        (["a", "--open"], "--open and --port go with --web"),
        (["a", "--port", "0"], "--open and --port go with --web"),
        (["a", "--web", "--json"], "--web goes without --json and --key"),
        (["tcp://host:7002", "--web"], "--web needs run folders of this host, got tcp://host:7002"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, why, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err
