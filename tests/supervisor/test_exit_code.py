"""The exit code of a run."""

import os
import signal
from contextlib import ExitStack

import pytest

from grpo_actors.config import Config
from grpo_actors.observe.status import StatusLine
from grpo_actors.supervisor.children import Actor
from grpo_actors.supervisor.closing_report import ClosingReport
from grpo_actors.supervisor.learner_records import LearnerRecords
from grpo_actors.supervisor.signals import Signals
from grpo_actors.supervisor.supervisor import Supervisor


@pytest.mark.parametrize(("reason", "code"), [("no worker", 2), ("Ctrl-C", 0), ("another", 128 + 15)])
def test_a_learner_that_is_ended_while_it_loads_gives_the_code_of_what_ended_the_run(reason, code, tmp_path):
    lifeline, write_end = os.pipe()
    learner = Actor("learner", ["timeit", "-n1", "-r1", "import time; time.sleep(600)"], {}, respawns=False)
    learner.start(lifeline)
    learner.process.send_signal(signal.SIGTERM)
    assert learner.process.wait() == -signal.SIGTERM
    config = Config.model_validate({"metrics": {"write_report": False}})
    supervisor = Supervisor(
        *(
            tmp_path,
            config,
            None,
            learner,
            (),
            None,
            ClosingReport(tmp_path, config),
            StatusLine(None),
            Signals(count=int(reason == "Ctrl-C")),
        ),
        *(lifeline, ExitStack(), LearnerRecords(tmp_path, "ipc://none")),
        _all_workers_failed=reason == "no worker",
    )
    assert supervisor.report_outcome() == code
    learner.end(deadline_s=0.0)
    os.close(lifeline)
    os.close(write_end)
