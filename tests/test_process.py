import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors import process
from grpo_actors.errors import DataError
from grpo_actors.out_of_memory import is_out_of_memory
from grpo_actors.process import EVALUATOR_LINE, LIFELINE, keeps_evaluator, run_command, take_secret

ROOT = Path(__file__).parents[1]


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_commands_exit_code_is_that_of_the_process(code):
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


#: As MLX raises them: on CUDA, on Metal, on the host.
LACKS = [
    "RuntimeError('cudaMallocAsync(&data, size, stream) failed: out of memory')",
    "RuntimeError('[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum')",
    "RuntimeError('[METAL] Command buffer execution failed: Insufficient Memory (00000008)')",
    "RuntimeError('[malloc] Unable to allocate 9 bytes.')",
    "MemoryError('std::bad_alloc')",
]


@pytest.mark.parametrize(
    ("role", "setting"),
    [
        ("learner", "learner.batch_size"),
        ("worker", "rollout.batch_groups"),
        ("evaluator", "evaluator.eval_batch_size"),
    ],
)
def test_a_lack_of_memory_is_one_line_with_the_setting_to_lower_and_the_exit_code_of_a_crash(role, setting):
    """With 1 the supervisor starts a worker again; with 2 it would give it up."""
    code = (
        "import atexit; from grpo_actors.process import run_command\n"
        "atexit.register(print, 'destructors run')\n"
        f"def main(): raise {LACKS[0]}\nrun_command(main, {role!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: out of memory (cudaMallocAsync(&data, size, stream) failed: out of memory); "
    )
    assert f"; lower {setting}" in line


@pytest.mark.parametrize("error", LACKS)
def test_a_lack_of_memory_is_recognised_on_every_back_end_also_as_the_cause_of_an_error(error):
    found = eval(error)  # noqa: S307 - the constants above
    assert is_out_of_memory(found)
    wrapped = DataError("cannot be loaded")
    wrapped.__cause__ = found
    assert is_out_of_memory(wrapped)


def test_an_error_that_only_quotes_the_words_is_no_lack_of_memory(capsys):
    with pytest.raises(SystemExit) as left:
        run_command(raising(DataError("train.jsonl:3: 'out of memory' is not JSON")), "learner")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: train.jsonl:3: 'out of memory' is not JSON\n"
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(raising(RuntimeError("[matmul] shapes (2,3) and (4,5)")), "learner")


@pytest.mark.parametrize("error", [ZeroDivisionError(), BrokenPipeError()])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raising(error))


def run_unread(code, stream, unbuffered=""):
    """Run a program of which nobody reads `stream` (stdout or stderr)."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as unread:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: unread}
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            **streams,
            check=False,
            timeout=HANG_S,
        )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])  # less and more than Python's output buffer
def test_a_reader_that_leaves_early_is_no_error(lines, unbuffered):
    code = f"from grpo_actors.process import run_command\nrun_command(lambda: print('x\\n' * {lines}) or 0)"
    done = run_unread(code, "stdout", unbuffered)
    assert (done.returncode, done.stderr) == (141, b"")


#: A module that warns when it is compiled and when it runs.
NOISY = "import warnings\nSAME = 'a' is 'a'\nwarnings.warn('at run time', UserWarning)\n"
#: A command of this package that imports the module and starts a child process that imports it too.
COMMAND = """
import subprocess, sys
from grpo_actors.process import run_command

def main():
    import noisy
    return subprocess.run([sys.executable, "-m", "grpo_actors.supervisor.entry", "noisy"]).returncode

run_command(main)
"""


def warned(folder, flags=(), asked=""):
    """Run `COMMAND` with `NOISY` in `folder`; return the counts of SyntaxWarnings, UserWarnings and lines on stderr."""
    folder.mkdir()
    (folder / "noisy.py").write_text(NOISY)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{folder}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": asked,
    }
    command = [sys.executable, *flags, "-c", COMMAND]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=HANG_S
    )
    return [done.stderr.count(text) for text in (": SyntaxWarning:", ": UserWarning:", "\n")]


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_warnings_of_other_packages_do_not_reach_the_terminal(tmp_path, folder):
    assert warned(tmp_path / folder) == [0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "asked"), [(("-W", "default"), ""), (("-X", "dev"), ""), ((), "default::SyntaxWarning")]
)
def test_a_user_who_asks_for_warnings_gets_those_of_all_processes(tmp_path, flags, asked):
    # One of each kind from the command's own process, and one of each from its child.
    assert warned(tmp_path / "site-packages", flags, asked)[:2] == [2, 2]


def test_warnings_about_a_users_own_file_are_shown(tmp_path):
    assert warned(tmp_path / "mine")[:2] == [2, 2]


def test_warnings_of_this_package_are_shown_wherever_it_is_installed(monkeypatch):
    own, other = "/lib/site-packages/grpo_actors/backend.py", "/lib/site-packages/sympy/core.py"
    monkeypatch.setattr(process, "_PACKAGE", Path(own).parent)
    with warnings.catch_warnings(record=True) as shown:
        for file in (own, other, "<string>"):
            process._show_own(RuntimeWarning("slow"), RuntimeWarning, file, 1)
    assert [warning.filename for warning in shown] == [own]


def test_a_program_that_imports_the_package_keeps_its_warnings():
    code = "import warnings\nbefore = warnings.showwarning\nimport grpo_actors\nassert warnings.showwarning is before"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("limit", ["", "0", "1234567890"])
def test_the_limits_in_the_environment_reach_mlx(limit):
    code = (
        "import mlx.core as mx\nfrom grpo_actors.process import bound_memory\nbefore = mx.get_memory_limit()\n"
        "bound_memory()\nprint(before == mx.get_memory_limit(), mx.get_memory_limit(), mx.set_cache_limit(0) < before / 4)"
    )
    environment = os.environ | ({process.MEMORY_LIMIT: limit} if limit else {})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    unchanged, memory, cache_is_bounded = done.stdout.split()
    assert cache_is_bounded == "True"
    if limit.strip("0"):
        assert memory == limit
    else:
        assert unchanged == "True"


def test_a_limit_for_freed_arrays_is_for_those_of_a_gpu():
    code = (
        "import mlx.core as mx\nfrom grpo_actors.process import bound_memory\n"
        "mx.set_cache_limit(before := mx.set_cache_limit(0))\nbound_memory()\n"
        "gpu = mx.default_device().type == mx.DeviceType.gpu\n"
        "print(mx.set_cache_limit(0) == (12345678 if gpu else before))"
    )
    environment = os.environ | {process.CACHE_LIMIT: "12345678"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == "True\n"


def test_an_evaluator_is_kept_until_the_supervisor_closes_the_line(monkeypatch):
    line, write_end = os.pipe()
    with os.fdopen(line):
        assert not keeps_evaluator()
        monkeypatch.setenv(EVALUATOR_LINE, str(line))
        assert keeps_evaluator()
        os.close(write_end)
        assert not keeps_evaluator()


def test_a_secret_is_taken_once_and_hidden_from_children(monkeypatch):
    monkeypatch.setenv("SECRET_OF_A_TEST", "s")
    assert take_secret("SECRET_OF_A_TEST") == "s"
    assert "SECRET_OF_A_TEST" not in os.environ
    assert take_secret("SECRET_OF_A_TEST") == ""


#: Sends itself signals, and prints after each whether it was asked to stop; at last, how many threads follow its parent.
SIGNALLED = """
import os, signal, sys, threading
if sys.argv[1] == 'nohup':
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from grpo_actors.process import LIFELINE, enter_process, follow_parent

stop = enter_process()
follow_parent()
for name in sys.argv[2:]:
    os.kill(os.getpid(), getattr(signal, name))
    print(bool(stop))
print([thread.name for thread in threading.enumerate()].count(LIFELINE))
"""


@pytest.mark.parametrize(
    ("started", "signals", "asked"),
    [
        ("by hand", ["SIGUSR1", "SIGTERM", "SIGHUP", "SIGHUP"], [False, True, True, True]),
        ("by hand", ["SIGINT"], [True]),
        ("by hand", ["SIGHUP", "SIGHUP"], [True, True]),  # a closed terminal may tell it twice
        ("nohup", ["SIGHUP", "SIGTERM"], [False, True]),
        ("supervised", ["SIGUSR1", "SIGINT", "SIGHUP", "SIGTERM"], [False, False, False, True]),
    ],
)
def test_the_first_signal_asks_to_stop_unless_somebody_else_decides(started, signals, asked):
    lifeline, write_end = os.pipe()
    threads = int(started == "supervised")
    with os.fdopen(lifeline), os.fdopen(write_end, "wb"):
        done = subprocess.run(
            [sys.executable, "-c", SIGNALLED, started, *signals],
            cwd=ROOT,
            env={**os.environ, **({LIFELINE: str(lifeline)} if threads else {})},
            pass_fds=[lifeline],
            capture_output=True,
            text=True,
            check=True,
            timeout=HANG_S,
        )
    assert done.stdout.split() == [*map(str, asked), str(threads)]
    # At SIGUSR1 the stacks of all threads are printed.
    assert done.stderr.count("(most recent call first)") == ("SIGUSR1" in signals) * (1 + threads)


ENDING_AT_ONCE = """
import sys, time
from functools import partial
from pathlib import Path
from grpo_actors.process import enter_process, removed_at_once

path = Path(sys.argv[1])
path.touch()
enter_process()
with removed_at_once(path.unlink), removed_at_once(partial(Path('/nowhere').unlink)):
    print('ready', flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("cause", ["two signals", "the supervisor's death"])
def test_a_process_that_ends_at_once_removes_what_would_outlive_it(cause, tmp_path):
    path = tmp_path / "socket"
    lifeline, write_end = os.pipe()
    supervised = cause == "the supervisor's death"
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING_AT_ONCE, str(path)],
        cwd=ROOT,
        env={**os.environ, **({LIFELINE: str(lifeline)} if supervised else {})},
        pass_fds=[lifeline],
        stdout=subprocess.PIPE,
    )
    with process, os.fdopen(lifeline):
        assert process.stdout.readline() == b"ready\n"
        assert path.exists()
        if supervised:
            os.close(write_end)
        else:
            # One after the other: two that wait together are one.
            while process.poll() is None:
                process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == (1 if supervised else 128 + signal.SIGTERM)
    assert not path.exists()


PRINTS = """
import os, sys
from grpo_actors.process import run_command

def main():
    for stream in (sys.stdout, sys.stderr):
        print('0.4 → 0.5', file=stream, flush=True)
    r, w = os.pipe()  # descriptors 0 to 2 stay with what is printed
    return 0 if min(r, w) > 2 else 7

run_command(main)
"""


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8"])
def test_no_terminal_changes_what_a_command_does(redirection, encoding):
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PRINTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
        timeout=HANG_S,
    )
    shown = b"0.4 \\u2192 0.5\n" if "ascii" in encoding else "0.4 → 0.5\n".encode()
    outputs = [b"" if (">" in redirection and "2>" not in redirection) or " >&-" in redirection else shown]
    outputs.append(b"" if "2>" in redirection else shown)
    assert (done.returncode, done.stdout, done.stderr) == (0, *outputs)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_nobody_reads_on_standard_error_is_dropped(unbuffered):
    code = (
        "import sys\nfrom grpo_actors.process import run_command\n"
        "def main():\n    for _ in range(3): print('note', file=sys.stderr)\n    print('done')\n    return 0\nrun_command(main)"
    )
    done = run_unread(code, "stderr", unbuffered)
    assert (done.returncode, done.stdout) == (0, b"done\n")


@pytest.mark.parametrize("command", ["rollout", "evaluator"])
def test_a_command_starts_without_docstrings(command):
    subprocess.run(
        [sys.executable, "-OO", "-m", f"grpo_actors.{command}", "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
