"""Test when a child is started again and when not, with real processes."""

import os
import time
from pathlib import Path

import pytest

from grpo_actors.supervisor.children import BACKGROUND_NICE, Actor


@pytest.fixture
def lifeline():
    read_end, write_end = os.pipe()
    yield read_end
    os.close(read_end)
    os.close(write_end)


def ended(actor: Actor) -> int:
    deadline_s = time.monotonic() + 60
    while actor.returncode is None:
        assert time.monotonic() < deadline_s, "still runs"
        time.sleep(0.01)
    return actor.returncode


def test_a_child_that_cannot_do_its_work_is_reported_once_and_not_started_again(lifeline, tmp_path):
    actor = Actor("rollout-0", ["grpo_actors.tail", str(tmp_path / "no-run")], {}, respawns=True)
    actor.start(lifeline)
    assert ended(actor) == 2
    assert actor.revive(lifeline) == "rollout-0 cannot do its work and is not started again"
    assert actor.is_hopeless
    assert actor.revive(lifeline) is None
    assert not actor.alive
    actor.end(deadline_s=0.0)


def test_a_child_that_crashed_is_started_again_after_its_pause(lifeline):
    actor = Actor("rollout-0", ["grpo_actors.no_such_module"], {}, respawns=True)
    actor.start(lifeline)
    assert ended(actor) == 1
    assert actor.revive(lifeline) == "rollout-0 ended with 1; starts again in 1 s"
    first, deadline_s = actor.process, time.monotonic() + 60
    while actor.process is first:
        assert time.monotonic() < deadline_s, "never started again"
        assert actor.revive(lifeline) is None
        time.sleep(0.01)
    ended(actor)
    actor.end(deadline_s=0.0)


def shown(actor: Actor) -> list[str]:
    """Wait until the child has ended; return the lines that it printed."""
    ended(actor)
    lines = list(actor.printed())
    actor.end(deadline_s=0.0)
    return lines


def test_a_child_in_the_background_yields_cores_and_gpu_to_the_others(lifeline, tmp_path):
    (tmp_path / "shows_priority.py").write_text(
        "import os\nprint(os.getpriority(os.PRIO_PROCESS, 0), os.environ.get('CUDA_MPS_CLIENT_PRIORITY'))\n"
    )
    environment = {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    own = os.getpriority(os.PRIO_PROCESS, 0)
    shows = ["shows_priority"]
    urgent = Actor("rollout-0", shows, environment, respawns=False)
    waiting = Actor("evaluator", shows, environment, respawns=False, in_background=True)
    for actor in (urgent, waiting):
        actor.start(lifeline)
    assert shown(urgent) == [f"{own} {os.environ.get('CUDA_MPS_CLIENT_PRIORITY')}"]
    assert shown(waiting) == [f"{min(19, own + BACKGROUND_NICE)} 1"]
