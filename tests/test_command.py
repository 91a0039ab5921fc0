import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_actors.command import run_command
from grpo_actors.errors import DataError

ROOT = Path(__file__).parents[1]


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_tools_exit_code_is_the_processs(code):
    with pytest.raises(SystemExit) as left:
        run_command(lambda: code)
    assert left.value.code == code


def test_an_error_raised_on_purpose_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        run_command(raising(DataError("train.jsonl: line 3:\nnot JSON")))
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "error: train.jsonl: line 3: not JSON\n")


def test_ctrl_c_is_quiet(capsys):
    with pytest.raises(SystemExit) as left:
        run_command(raising(KeyboardInterrupt()))
    assert left.value.code == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ZeroDivisionError(), BrokenPipeError()])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raising(error))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])  # less and more than Python's output buffer
def test_a_reader_that_leaves_early_is_no_error(lines, unbuffered):
    code = f"from grpo_actors.command import run_command\nrun_command(lambda: print('x\\n' * {lines}) or 0)"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, b"")
