"""Test when a child is started again and when not, with real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.process import BACKGROUND_NICE, EXIT_RANK_LOST
from grpo_actors.progress import PROGRESS
from grpo_actors.supervisor import children
from grpo_actors.supervisor.children import HEALTHY_S, LONGEST_BACKOFF_S, Actor
from grpo_actors.supervisor.deaths import MAX_DEATHS, MAX_STARTS


@pytest.fixture
def lifeline():
    read_end, write_end = os.pipe()
    yield read_end
    os.close(read_end)
    os.close(write_end)


def ended(actor: Actor) -> int:
    deadline_s = time.monotonic() + HANG_S
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
    assert actor.trouble == "is not started again"
    assert actor.revive(lifeline) is None
    assert not actor.alive
    actor.end(deadline_s=0.0)


def test_a_child_that_crashed_is_started_again_after_its_pause(lifeline):
    actor = Actor("rollout-0", ["grpo_actors.no_such_module"], {}, respawns=True)
    actor.start(lifeline)
    assert ended(actor) == 1
    assert actor.revive(lifeline) == "rollout-0 ended with 1; starts again in 1 s"
    first, deadline_s = actor.process, time.monotonic() + HANG_S
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


def test_a_child_in_the_background_yields_the_cores_to_the_others(lifeline, tmp_path):
    (tmp_path / "shows_priority.py").write_text("import os\nprint(os.getpriority(os.PRIO_PROCESS, 0))\n")
    environment = {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    own = os.getpriority(os.PRIO_PROCESS, 0)
    shows = ["shows_priority"]
    urgent = Actor("rollout-0", shows, environment, respawns=False)
    waiting = Actor("evaluator", shows, environment, respawns=False, in_background=True)
    for actor in (urgent, waiting):
        actor.start(lifeline)
    assert shown(urgent) == [str(own)]
    assert shown(waiting) == [str(min(19, own + BACKGROUND_NICE))]


def test_of_a_progress_bar_the_last_state_is_shown_and_no_empty_line(lifeline, tmp_path):
    text = "10 %\\r20 %\\rdone\\r\\n \\n\\nnext\\nnever ends"
    (tmp_path / "prints.py").write_text(f"print('{text}', end='', flush=True)")
    environment = {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    actor = Actor("child", ["prints"], environment, respawns=False)
    actor.start(lifeline)
    assert shown(actor) == ["done", "next"]


def test_a_child_that_left_by_itself_is_no_trouble_and_gets_what_it_inherits(lifeline, tmp_path):
    (tmp_path / "uses.py").write_text("import os, sys\nos.write(int(sys.argv[1]), b'mine')")
    environment = {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    read_end, write_end = os.pipe()
    actor = Actor("child", ["uses", str(write_end)], environment, respawns=True, inherited=(write_end,))
    actor.start(lifeline)
    os.close(write_end)
    assert shown(actor) == []
    assert os.read(read_end, 100) == b"mine"
    os.close(read_end)
    assert (actor.trouble, actor.revive(lifeline), actor.is_over) == (None, None, True)


@pytest.mark.parametrize("is_watched", [False, True])
def test_only_a_watched_child_has_a_pipe_for_its_progress_and_none_leaves_a_file_open(
    lifeline, tmp_path, is_watched
):
    (tmp_path / "tells.py").write_text(f"import os\nprint({PROGRESS!r} in os.environ)")
    environment = {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    opened = len(list(Path("/dev/fd").iterdir()))
    actor = Actor("child", ["tells"], environment, respawns=False)
    if is_watched:
        actor.is_watched = True
    actor.start(lifeline)
    assert shown(actor) == [str(is_watched)]
    assert len(list(Path("/dev/fd").iterdir())) == opened


def test_pauses_double_up_to_half_a_minute_and_begin_anew_after_a_minute_of_health():
    actor = Actor("child", [], {}, respawns=True, _started_s=time.monotonic())
    assert [actor._pause() for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_BACKOFF_S, 30.0]
    actor._started_s -= HEALTHY_S
    assert actor._pause() == 1.0


# --- children that report their progress ----------------------------------------------------------


@pytest.fixture
def watched(lifeline, tmp_path):
    """Make a child that runs this program and reports its progress; end it afterwards."""
    made = []

    def make(program: str, **more) -> Actor:
        (tmp_path / "program.py").write_text(program)
        environment = {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
        actor = Actor("child", ["program"], environment, respawns=True, is_watched=True, **more)
        actor.start(lifeline)
        made.append(actor)
        return actor

    yield make
    for actor in made:
        actor.end(deadline_s=0.0)


def until(condition, what: str):
    deadline_s = time.monotonic() + HANG_S
    while not (value := condition()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)
    return value


SPINS = """
import threading, time
from grpo_actors.progress import begin_work

def serve():
    while True:
        time.sleep(0.01)

def spin():
    while True:
        pass

threading.Thread(target=serve, daemon=True).start()
begin_work("lease 7", patience_s=1.0)
print("begun", flush=True)
spin()
"""


def test_a_child_that_prints_without_end_does_not_keep_the_supervisor(watched):
    child = watched("while True:\n    print('x' * 1000, flush=True)")
    until(lambda: next(child.printed(), None), "it prints")
    assert len(list(child.printed())) < 2000  # 16 reads of 64 KiB hold 1,048 lines
    assert child.alive


@pytest.mark.parametrize("stopped", [False, True])
def test_a_child_that_hangs_prints_its_stacks_and_is_started_again(watched, lifeline, stopped, monkeypatch):
    monkeypatch.setattr(children, "QUIET_S", 0.5)
    child = watched(SPINS, backoff_s=0.01)
    assert child.trouble == "still starts"
    until(lambda: "begun" in child.printed(), "it begins")
    first = child.process
    if stopped:
        child.send(signal.SIGSTOP)
    note = until(child.end_if_hung, "it is found to hang")
    assert note == "child has made no progress for 1 s at lease 7; its threads:"
    assert child.trouble == "is silent for 1 s at lease 7"
    until(lambda: child.end_if_hung() or not child.alive, "it is killed")
    assert child.returncode == -signal.SIGKILL
    stacks = "\n".join(child.printed())
    assert "in spin" in stacks
    assert "in serve" in stacks
    assert child.revive(lifeline) == "child made no progress for 1 s; starts again in 0 s"
    assert child.trouble == "made no progress for 1 s and starts again in 0 s"
    until(lambda: child.revive(lifeline) or child.process is not first, "it is started again")
    assert child.alive


DIES = """
import os
from grpo_actors.progress import begin_work, given_up

for work in ("checkpoint-5", "checkpoint-10"):
    begin_work(work)
    if work not in given_up():
        if work == "checkpoint-5":
            raise ValueError(f"process {os.getpid()} cannot read it")
        print("scored", work, flush=True)
"""


def deaths(child: Actor, lifeline: int) -> list[str]:
    """Start the child again as long as it dies; return what is said about its deaths."""
    notes = []
    until(lambda: notes.extend(filter(None, [child.revive(lifeline)])) or child.is_over, "it is over")
    return notes


def test_a_child_goes_on_without_work_of_which_it_died_three_times(watched, lifeline):
    child = watched(DIES, backoff_s=0.01, gives_up_work=True)
    *others, last = deaths(child, lifeline)
    assert others == ["child ended with 1; starts again in 0 s"] * (MAX_DEATHS - 1)
    assert last.startswith(
        "child gives up checkpoint-5: it ended with 1, 3 times in a row at checkpoint-5: ValueError: "
    )
    assert last.endswith(" cannot read it; starts again in 0 s")
    assert child.returncode == 0
    assert list(child.printed())[-1] == "scored checkpoint-10"


def test_a_child_that_cannot_give_up_its_work_is_given_up_itself(watched, lifeline):
    child = watched(DIES, backoff_s=0.01)
    *_, last = deaths(child, lifeline)
    assert "child ended with 1, 3 times in a row at checkpoint-5: ValueError: " in last
    assert last.endswith("; it is not started again")
    assert child.is_hopeless


DIFFERENT_ERRORS = """
from pathlib import Path
{first}
count = Path({count!r})
count.write_text(count.read_text() + "x")
if len(count.read_text()) < 8:
    raise ValueError(chr(64 + len(count.read_text())))
"""


def test_a_child_that_cannot_start_five_times_is_given_up_whatever_the_errors(watched, lifeline, tmp_path):
    (tmp_path / "count").write_text("")
    child = watched(DIFFERENT_ERRORS.format(first="", count=str(tmp_path / "count")), backoff_s=0.01)
    *others, last = deaths(child, lifeline)
    assert others == ["child ended with 1; starts again in 0 s"] * (MAX_STARTS - 1)
    assert (
        last
        == "child cannot start: it ended with 1, the last of 5 times: ValueError: E; it is not started again"
    )
    assert child.is_hopeless


def test_a_child_that_works_and_dies_of_different_errors_is_always_started_again(watched, lifeline, tmp_path):
    (tmp_path / "count").write_text("")
    works = "from grpo_actors.progress import begin_work\nbegin_work('')"
    program = DIFFERENT_ERRORS.format(first=works, count=str(tmp_path / "count"))
    assert len(deaths(watched(program, backoff_s=0.01), lifeline)) == 7


def test_a_child_that_is_killed_before_it_has_work_is_always_started_again(watched, lifeline):
    child = watched("import time\nprint('loads', flush=True)\ntime.sleep(60)", backoff_s=0.01)
    for _ in range(MAX_DEATHS + 1):
        until(lambda: "loads" in child.printed(), "it loads")
        child.send(signal.SIGKILL)
        ended(child)
        assert child.revive(lifeline) == "child was ended by signal 9; starts again in 0 s"
        until(lambda: child.revive(lifeline) or child.alive, "it is started again")


@pytest.mark.parametrize(
    ("code", "again"), [(-signal.SIGKILL, True), (EXIT_RANK_LOST, True), (-signal.SIGTERM, False), (1, False)]
)
def test_a_learner_of_several_ranks_is_started_again_if_one_was_killed_and_not_if_it_failed(
    lifeline, code, again
):
    actor = Actor("learner", ["grpo_actors.no_such_module"], {}, respawns=False, respawns_if_killed=True)
    program = f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
    actor.process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert ended(actor) == code
    assert actor.is_over != again
    note = actor.revive(lifeline)
    assert (note is not None and note.endswith("; starts again in 1 s")) == again
    actor.end(deadline_s=0.0)


@pytest.mark.parametrize("has_hung", [False, True])
def test_a_child_that_is_not_to_be_started_again_is_over_however_it_ended(lifeline, has_hung):
    process = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    process.wait()
    once = Actor("learner", [], {}, respawns=False, process=process)
    again = Actor("learner", [], {}, respawns=False, respawns_if_hung=True, process=process)
    if has_hung:
        once._hung_since_s = again._hung_since_s = 0.0
    assert once.is_over
    assert once.revive(lifeline) is None
    assert again.is_over != has_hung
