"""A run that a program has started: it gets its settings from it, and ends with it."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.config import Config

ROOT = Path(__file__).parents[1]

#: A program that ignores closed terminals, as under nohup, has started this. It tells its settings, and what comes then.
RUN = """
import signal, sys
from grpo_actors.train.caller import settings_of_caller
hang_up = [signal.SIGHUP]
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, hang_up)
print(settings_of_caller().run.seed, flush=True)
if sys.argv[1] == 'waits':
    print(signal.sigtimedwait(hang_up, 0.1), flush=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, hang_up)
    signal.pause()
"""


@pytest.fixture
def started():
    """A function that starts the run and gives it its settings."""
    with ExitStack() as stack:

        def start(does):
            command = [sys.executable, "-c", RUN, does]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = stack.enter_context(subprocess.Popen(command, env=environment, **pipes))
            stack.callback(process.kill)
            settings = Config.model_validate({"run": {"seed": 7}})
            process.stdin.write(settings.model_dump_json() + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "7\n"
            return process

        yield start


def test_a_run_stops_as_after_a_closed_terminal_when_its_program_ends_and_not_before(started):
    run = started("waits")
    assert run.stdout.readline() == "None\n"
    run.stdin.close()
    assert run.wait(HANG_S) == -signal.SIGHUP


def test_a_run_may_end_before_its_program(started):
    assert started("ends").wait(HANG_S) == 0
