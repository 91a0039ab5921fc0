"""Programs that misbehave, each in a real process."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.errors import RewardError
from grpo_actors.tasks.code_program import FILE_BYTES, OPEN_FILES
from grpo_actors.tasks.code_tests import CodeLimits, CodeTests, passed_share, program_of
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem

# Generous: two cores may be busy. Programs that hang are given less.
LIMITS = CodeLimits(seconds=20.0, memory_bytes=2**30)
BRIEF = CodeLimits(seconds=1.0, memory_bytes=2**30)

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]


def chats(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def fenced(program):
    return f"<reasoning>\nok\n</reasoning>\n<answer>\n```python\n{program}```\n</answer>"


@pytest.mark.parametrize(
    ("written", "program"),
    [
        (fenced(DOUBLE), DOUBLE),
        ("```python\nx = 1\n```\nBetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("<answer>x = 1</answer>", "x = 1"),
        ("```python\nx = 0\n```<answer>x = 1</answer>", "x = 1"),
        ("```text\n3\n```\nor\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", ""),
        ("no code", ""),
    ],
)
def test_the_program_is_the_last_block_of_python_in_the_answer(written, program):
    assert program_of(written) == program


@pytest.mark.parametrize("hostile", ["```python\n", "```", "``` ", "<answer>```\n"])
def test_a_megabyte_of_hostile_text_is_read_in_under_a_second(hostile):
    start_s = time.process_time()
    program_of(hostile * (2**20 // len(hostile)))
    assert time.process_time() - start_s < 1


@pytest.mark.parametrize(
    ("program", "share"),
    [
        (DOUBLE, 1.0),
        ("def double(x):\n    return x * x\n", 0.5),  # 2 · 2 = 4, (-1) · (-1) ≠ -2
        ("def double(x:\n", 0.0),
        ("raise SystemExit(0)\n", 0.0),
        ("import os\nos._exit(0)\n", 0.0),
        (DOUBLE + "if __name__ == '__main__':\n    raise ValueError\n", 1.0),
        ("", 0.0),
        ("print('é' * 10)\n" + DOUBLE, 1.0),
        ("x = '\ud83d'\n" + DOUBLE, 0.0),  # half a surrogate pair: a tokenizer may yield it
    ],
)
def test_the_value_is_the_share_of_tests_that_raise_nothing(program, share):
    assert passed_share(program, TESTS, LIMITS) == share


@pytest.mark.parametrize(
    "attempt",
    [
        # A verdict in a place where none is read.
        'import sys\nprint(\'{"ready": true}\\n{"test": 0}\\n{"test": 1}\')\nsys.stdout.flush()\nraise SystemExit',
        # The same on every descriptor, without the token.
        """import os
for descriptor in range(64):
    try:
        os.write(descriptor, b'{"test": 0}\\n{"token": "", "test": 1}\\n{"token": null, "test": 0}\\n')
    except OSError:
        pass
os._exit(0)""",
        # Reports all tests as passed before they ran.
        "import builtins\nbuiltins.exec = lambda *arguments: None\nbuiltins.compile = lambda *arguments: None",
        "import builtins\nbuiltins.BaseException = ()",
        "import json, socket\njson.dumps = lambda *a, **k: 'null'\nsocket.socket.sendall = lambda *a: None",
        "import sys\nsys.exit = lambda *a: None\nraise SystemExit(0)",
        "def double(x):\n    raise SystemExit(0)",
        "def double(x):\n    import os\n    os._exit(0)",
    ],
)
def test_a_success_that_is_only_claimed_does_not_count(attempt):
    assert passed_share(attempt, TESTS, LIMITS) == 0.0


def test_tests_that_passed_before_one_that_hangs_count():
    program = "def double(x):\n    while x < 0: pass\n    return 2 * x\n"
    assert passed_share(program, TESTS, BRIEF) == 0.5


def test_a_test_does_not_see_what_an_earlier_one_defined():
    assert passed_share(DOUBLE, ["y = double(1)", "assert y == 2"], LIMITS) == 0.5


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        """import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: pass""",
        "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(1000)",
        "import re\nre.fullmatch(r'(a*)*b', 'a' * 100)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "print('x' * 2**20)\nwhile True: print('x' * 2**20)",
        """import os
while True:
    for descriptor in range(3, 64):
        try: os.write(descriptor, b'x' * 4096)
        except OSError: pass""",
    ],
)
def test_a_program_that_hangs_or_floods_is_worth_nothing_when_its_time_is_over(program):
    start = time.monotonic()
    assert passed_share(program + "\n" + DOUBLE, TESTS, BRIEF) == 0.0
    assert time.monotonic() - start < HANG_S  # never the 1,000 s


def test_memory_beyond_the_limit_is_an_error_of_the_program():
    assert passed_share(DOUBLE + "x = bytearray(2**30)\n", TESTS, LIMITS) == 0.0
    assert passed_share(DOUBLE + "x = bytearray(2**27)\n", TESTS, LIMITS) == 1.0


def test_a_file_beyond_the_limit_cannot_be_written():
    program = "with open('big', 'wb') as file:\n    file.write(bytes({}))\n" + DOUBLE
    assert passed_share(program.format(2**20), TESTS, LIMITS) == 1.0
    assert passed_share(program.format(2**25), TESTS, LIMITS) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce all of them")
def test_a_program_has_its_limits_and_no_privilege():
    program = "import os, resource, signal\nstatus = open('/proc/self/status').read()\n"
    tests = [
        # Whole seconds; one more, and the kernel kills it.
        "assert resource.getrlimit(resource.RLIMIT_CPU) == (20, 21)",
        f"assert resource.getrlimit(resource.RLIMIT_AS) == ({2**30}, {2**30})",
        f"assert resource.getrlimit(resource.RLIMIT_FSIZE) == ({FILE_BYTES}, {FILE_BYTES})",
        f"assert resource.getrlimit(resource.RLIMIT_NOFILE) == ({OPEN_FILES}, {OPEN_FILES})",
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
        "assert resource.getrlimit(resource.RLIMIT_NPROC) == (0, 0)",
        # The timer rings once, after the parent should have ended this process.
        "left, every = signal.getitimer(signal.ITIMER_REAL)\nassert 19 < left <= 21 and every == 0",
        "assert 'NoNewPrivs:\\t1' in status",
        "assert all(f'{kind}:\\t{0:016}' in status for kind in ('CapInh', 'CapPrm', 'CapEff'))",
        "assert os.getuid() != 0",
    ]
    assert passed_share(program, tests, replace(LIMITS, seconds=19.5)) == 1.0
    isolates = subprocess.run(
        ["unshare", "--net", "--map-root-user", "true"], check=False, capture_output=True
    )
    if isolates.returncode == 0:
        own = str(Path("/proc/self/ns/net").readlink())
        assert passed_share(program, [f"assert os.readlink('/proc/self/ns/net') != {own!r}"], LIMITS) == 1.0
    if os.getuid() == 0:  # root needs no other user's view of the files for that
        own = str(Path("/proc/self/ns/user").readlink())
        assert passed_share(program, [f"assert os.readlink('/proc/self/ns/user') == {own!r}"], LIMITS) == 1.0


@pytest.mark.parametrize(
    "start",
    [
        "import os\nos.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        pytest.param(
            "import threading\nthreading.Thread(target=print).start()",
            marks=pytest.mark.skipif(
                sys.platform != "linux", reason="Linux alone counts threads as processes"
            ),
        ),
    ],
)
def test_no_further_process_can_be_started(start):
    program = f"{start}\n"
    assert passed_share(program, ["pass"], LIMITS) == 0.0


def test_the_program_finds_an_empty_folder_and_environment_and_no_open_file(tmp_path):
    with (tmp_path / "inherited").open("w") as inherited:
        os.set_inheritable(inherited.fileno(), True)
        tests = [
            "assert os.listdir() == []",
            "assert set(os.environ) <= {'HOME', 'TMPDIR', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}",
            # 0, 1, 2 and the channel.
            "assert sum(is_open(n) for n in range(64)) == 4",
            "assert sys.flags.isolated",
        ]
        program = """import os, sys
def is_open(n):
    try:
        os.fstat(n)
    except OSError:
        return False
    return True
"""
        assert passed_share(program, tests, LIMITS) == 1.0


def test_the_folder_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tests = [f"assert os.getcwd().startswith({str(tmp_path.resolve())!r})"]
    assert passed_share("import os\nopen('left', 'w').close()\nos.mkdir('more')\n", tests, LIMITS) == 1.0
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('deeper')\n    os.chdir('deeper')\n"
    assert passed_share(deep, ["pass"], LIMITS) == 1.0
    assert list(tmp_path.iterdir()) == []


def test_the_process_is_gone_afterwards():
    # It listens on a port as long as it lives.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = f"import socket, time\ns = socket.create_server(('127.0.0.1', {port}))\ntime.sleep(1000)\n"
    assert passed_share(program, TESTS, BRIEF) == 0.0
    with socket.socket() as again, pytest.raises(ConnectionRefusedError):
        again.connect(("127.0.0.1", port))


def test_a_sleeping_program_ends_soon_after_a_worker_that_was_killed(tmp_path):
    started = tmp_path / "pid"
    program = f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    script = (
        "from grpo_actors.tasks.code_tests import CodeLimits, passed_share\n"
        f"passed_share({program!r}, ['pass'], CodeLimits(3.0, 2**30))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2]) as worker:
        deadline_s = time.monotonic() + HANG_S
        while not (started.is_file() and started.read_text()):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        worker.kill()
    pid = int(started.read_text())
    while _is_alive(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # in a container, an orphan may stay a zombie
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_group_is_scored_in_its_order_and_completions_without_a_program_get_nothing():
    reward = CodeTests(LIMITS)
    completions = chats(fenced(DOUBLE), "I do not know.", fenced("def double(x):\n    return x * x\n"))
    assert reward([], completions, [], tests=[TESTS] * 3) == [1.0, 0.0, 0.5]
    assert reward([], completions, [], tests=["\n".join(TESTS)] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("columns", [{}, {"tests": [None]}, {"tests": [[]]}, {"tests": [[1]]}])
def test_a_problem_without_tests_is_a_failure_that_says_so(columns):
    with pytest.raises(RewardError, match="needs the column 'tests', a text of Python or a list of such"):
        CodeTests(LIMITS)([], chats("x"), [], **columns)


def test_nothing_runs_unless_it_was_allowed():
    with pytest.raises(
        RewardError, match=r"runs code that the model wrote .* reward.allow_code_execution = true"
    ):
        Scorer({"code_tests": 1.0}, timeout_s=5)
    problem = Problem("double", ({"role": "user", "content": "Double it."},), "", {"tests": TESTS})
    with Scorer({"code_tests": 1.0}, timeout_s=HANG_S, code=LIMITS) as scorer:
        assert scorer.score(problem, [fenced(DOUBLE)]).rewards == {"code_tests": [1.0]}
