"""A failpoint fires once, in the first process that passes it, and in the way that was asked for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.failpoints import FAILPOINTS

ROOT = Path(__file__).parents[1]
PASSING = "from grpo_actors.failpoints import reach\nreach('here')\nprint('went on', flush=True)"


def passing(folder, code=PASSING):
    """Start a process that passes the failpoint."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, FAILPOINTS: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    output, errors = process.communicate(timeout=HANG_S)
    return process.returncode, output, errors.splitlines()[-1] if errors else ""


def fired(folder, process):
    return [path.name for path in folder.iterdir()] == [f"here.{process.pid}"]


@pytest.mark.parametrize(
    ("action", "code", "output", "error"),
    [
        ("kill", -signal.SIGKILL, "", ""),
        ("full\n", 1, "", "OSError: [Errno 28] No space left on device"),
        ("smile", 1, "", "ValueError: {folder}/here: must be kill, stop, hang or full, got 'smile'"),
    ],
)
def test_it_fails_as_it_was_told_and_says_where_it_fired(tmp_path, action, code, output, error):
    (tmp_path / "here").write_text(action)
    process = passing(tmp_path)
    assert outcome(process) == (code, output, error.format(folder=tmp_path))
    assert fired(tmp_path, process)
    assert outcome(passing(tmp_path)) == (0, "went on\n", ""), "once"


def test_a_stopped_process_goes_on_when_it_is_continued(tmp_path):
    (tmp_path / "here").write_text("stop")
    process = passing(tmp_path)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert outcome(process) == (0, "went on\n", "")


def test_one_that_hangs_does_not_go_on(tmp_path):
    (tmp_path / "here").write_text("hang")
    process = passing(tmp_path)
    while not fired(tmp_path, process):
        assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)  # whoever does not hang has ended by then
    process.kill()
    assert outcome(process) == (-signal.SIGKILL, "", "")


@pytest.mark.parametrize("folder", ["", "absent"])
def test_what_is_not_armed_changes_nothing(tmp_path, folder):
    assert outcome(passing(folder and tmp_path / folder)) == (0, "went on\n", "")
