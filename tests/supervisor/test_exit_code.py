"""What a run says at its end, and its exit code."""

import io
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
from checkpoint_files import write_checkpoint_files

from grpo_actors.config import Config
from grpo_actors.observe.status import StatusLine
from grpo_actors.process import EXIT_CRASH, EXIT_RANK_LOST, EXIT_USAGE
from grpo_actors.supervisor.children import Actor
from grpo_actors.supervisor.closing_report import ClosingReport
from grpo_actors.supervisor.learner_records import LearnerRecords
from grpo_actors.supervisor.signals import Signals
from grpo_actors.supervisor.supervisor import Supervisor


def outcome(run_dir, learner, **more):
    """Return the exit code of a run with this learner, and the lines that it prints."""
    config, stream = Config.model_validate({"metrics": {"write_report": False}}), io.StringIO()
    signals = Signals(count=more.pop("count", 0))
    with ClosingReport(run_dir, config) as report, StatusLine(None, stream) as status:
        supervisor = Supervisor(
            *(run_dir, config, None, learner, (), None, report, status, signals),
            *(-1, ExitStack(), LearnerRecords(run_dir, "ipc://none")),
            **more,
        )
        return supervisor.report_outcome(), stream.getvalue().splitlines()


@pytest.mark.parametrize(("reason", "code"), [("no worker", 2), ("Ctrl-C", 0), ("another", 128 + 15)])
def test_a_learner_that_is_ended_while_it_loads_gives_the_code_of_what_ended_the_run(reason, code, tmp_path):
    lifeline, write_end = os.pipe()
    learner = Actor("learner", ["timeit", "-n1", "-r1", "import time; time.sleep(600)"], {}, respawns=False)
    learner.start(lifeline)
    learner.process.send_signal(signal.SIGTERM)
    assert learner.process.wait() == -signal.SIGTERM
    is_hopeless = reason == "no worker"
    found, _ = outcome(tmp_path, learner, count=int(reason == "Ctrl-C"), _all_workers_failed=is_hopeless)
    assert found == code
    learner.end(deadline_s=0.0)
    os.close(lifeline)
    os.close(write_end)


def ended_with(code):
    """Return a learner whose process has ended."""
    learner = Actor("learner", [], {}, respawns=False)
    program = f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
    learner.process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    learner.process.wait()
    return learner


@pytest.mark.parametrize(
    ("returned", "code", "how"),
    [
        (EXIT_CRASH, 1, "ended with 1"),
        (-signal.SIGKILL, 128 + 9, "was ended by signal 9"),
        (EXIT_RANK_LOST, 1, "lost one of its ranks"),
        (EXIT_USAGE, 2, None),  # it has said why
    ],
)
def test_a_learner_that_failed_has_said_why_or_how_it_ended_is_told_with_what_the_same_command_does(
    returned, code, how, tmp_path
):
    learner = ended_with(returned)
    effects = ["starts it again", "continues the run after update 4"]
    found = [outcome(tmp_path, learner)]
    write_checkpoint_files(tmp_path, 3)
    write_checkpoint_files(tmp_path, 4)
    found.append(outcome(tmp_path, learner))
    told = [[f"the learner {how}; the same command {effect}"] if how else [] for effect in effects]
    assert found == [(code, lines) for lines in told]


def test_a_run_that_ended_well_says_what_was_gained_what_is_kept_and_what_may_follow(tmp_path):
    write_checkpoint_files(tmp_path, 4)
    code, lines = outcome(tmp_path, ended_with(0))
    assert code == 0
    assert lines[:2] == ["not evaluated", f"last checkpoint: {tmp_path}/checkpoint-4"]
    assert any(line.strip().startswith("chat with it") for line in lines)


def test_a_run_that_ended_before_its_learner_was_started_ended_well(tmp_path):
    assert outcome(tmp_path, Actor("learner", [], {}, respawns=False))[0] == 0
