"""A run that a program has started, as this program sees it: its events, its end, its error. A short script is the run."""

import os
import sys
import threading

import pytest
from bounds import HANG_S

from grpo_actors.api import run as module
from grpo_actors.api.run import Run
from grpo_actors.config import Config
from grpo_actors.errors import RunError

#: Begins each script: reads the settings, and says events as a run does.
BEGIN = """#!{python} -IS
import json, os, signal, sys
settings = json.loads(sys.stdin.readline())
def say(topic, **fields):
    print(json.dumps({{"time": 1.0, "topic": topic, **fields}}), flush=True)
def error(*lines):
    print(*lines, sep="\\n", file=sys.stderr)
"""
#: Goes on until the program closes it, or a signal ends it.
WAITS = "sys.stdin.read()"
#: Says that it is ready, and how many signals have come; at the last one of them it fails.
FAILS_AT = """
signals = []
def stop(number, frame):
    signals.append(number)
    say(str(len(signals)))
    if len(signals) == {last}:
        error("error: full")
        sys.exit(1)
signal.signal(signal.SIGTERM, stop)
say("ready")
while sys.stdin.read(1):
    pass
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return a function that starts a run that is this script."""
    python, program, runs = sys.executable, tmp_path / "program", []

    def start(script="", **functions):
        program.write_text(BEGIN.format(python=python) + script)
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        settings = Config.model_validate({"run": {"output_dir": str(tmp_path / "run")}})
        runs.append(Run(settings, functions))
        return runs[-1]

    yield start
    for run in runs:
        if run.is_live:
            run._process.kill()
        assert run._ended.wait(HANG_S)


def test_all_events_come_in_order_also_those_across_a_border_of_what_is_read_at_once(started):
    # 4,000 lines of some 40 bytes: more than twice what is read at a time.
    run = started("for n in range(4000): say('x', n=n)")
    assert [event["n"] for event in run] == list(range(4000))
    assert [event["n"] for event in run] == list(range(4000)), "from the first one, also afterwards"


def test_it_gets_its_settings_and_the_address_of_the_functions(started):
    run = started(
        f"say('x', seed=settings['run']['seed'], address=os.environ['{module.ADDRESS}'])", reward=len
    )
    assert [(event["seed"], "@" in event["address"]) for event in run] == [(run.config.run.seed, True)]
    assert run.functions == {"reward": len}
    path = run._serving._path
    assert run.wait(HANG_S, show=False) is run
    assert not path.exists(), "served no longer"


def test_what_has_ended_has_nothing_open_and_nothing_to_stop(started, capsys):
    run = started()
    run.wait(show=False)
    assert not run.is_live
    assert run._process.stdin.closed
    assert repr(run) == f"<Run {run.folder}, ended with 0>"
    module._stop_all()
    assert capsys.readouterr().err == ""


def test_a_live_one_says_so_and_is_waited_for_in_parts(started):
    run = started(WAITS)
    assert run.is_live
    assert repr(run) == f"<Run {run.folder}, live>"
    for show in (False, True):
        with pytest.raises(TimeoutError, match=r"/run: the run goes on after 0\.01 s$"):
            run.wait(0.01, show=show)
    assert run.is_live
    assert (run.best, run.score) == (None, None)
    assert os.getsid(run._process.pid) == run._process.pid, "Ctrl-C does not reach it"
    [watching] = [thread for thread in threading.enumerate() if thread.name == "grpo-actors-run"]
    assert watching.daemon, "or the end of the program would wait for the run before it stops it"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("sys.exit(3)", "the run ended with 3"),
        ("error('first', 'last', ' '); sys.exit(1)", "last"),
        ("error('error: why', 'after'); sys.exit(2)", "why"),
        ("error('error: the learner', 'rollout-0: error: x'); sys.exit(2)", "the learner"),
        ("error('rollout-0: error: x', 'after'); sys.exit(2)", "rollout-0: error: x"),
        ("say('note', text='error: noted'); say('phase', text='error: no'); sys.exit(2)", "noted"),
        ("error('x' * 100_000, 'error: the end'); sys.exit(1)", "the end"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "the run ended with -15"),  # by somebody else
    ],
)
def test_a_failed_run_says_why_wherever_it_is_asked_for(started, script, says):
    run = started(script)
    for ask in (run.wait, run.stop, lambda: list(run)):
        with pytest.raises(RunError) as caught:
            ask()
        assert str(caught.value) == f"{run.folder}: {says}"


def test_a_start_returns_after_the_checks_or_with_their_refusal(started):
    run = started(f"say('phase', text='checks'); say('start'); {WAITS}")
    run.begin()
    assert run.is_live
    with pytest.raises(RunError, match=r": refused$"):
        started("say('phase', text='checks'); error('error: refused'); sys.exit(2)").begin()
    started("say('phase', text='checks')").begin()


def test_a_run_that_ends_as_it_was_asked_to_has_not_failed(started):
    run = started(WAITS)  # a signal ends it: it has not got ready for one yet
    assert run.stop() is run
    assert run._process.returncode < 0
    assert run.stop() is run, "one that has ended stays as it is"


def test_a_run_that_fails_while_it_stops_has_failed_unless_it_was_to_stop_at_once(started):
    run = started(FAILS_AT.format(last=1))
    next(iter(run))
    with pytest.raises(RunError, match=r": full$"):
        run.stop()
    run = started(FAILS_AT.format(last=2))
    events = iter(run)
    next(events)
    run._ask_to_stop()
    assert next(events)["topic"] == "1"
    assert run.stop() is run


def test_a_program_that_ends_stops_its_runs_and_says_what_became_of_them(started, capsys):
    run = started(FAILS_AT.format(last=1))
    next(iter(run))
    module._stop_all()
    assert not run.is_live
    assert capsys.readouterr().err.splitlines() == [
        f"{run.folder}: the program ends, so the run finishes its step, writes a checkpoint and stops",
        f"error: {run.folder}: full",
    ]


def test_a_program_that_is_interrupted_while_it_ends_stops_its_runs_at_once(started, monkeypatch):
    run = started(FAILS_AT.format(last=2))
    events = iter(run)
    next(events)
    wait, interrupts = run._ended.wait, [KeyboardInterrupt]

    def interrupted(*arguments):
        if interrupts:
            interrupt = interrupts.pop()
            assert next(events)["topic"] == "1"
            raise interrupt
        return wait(*arguments)

    monkeypatch.setattr(run._ended, "wait", interrupted)
    module._stop_all()
    assert run._process.returncode == 1


def test_a_fork_of_the_program_does_not_stop_the_run(started, capsys):
    run = started(WAITS)
    run._owner = os.getppid()
    module._stop_all()
    assert run.is_live
    assert capsys.readouterr().err == ""


def test_each_note_is_shown_once_however_often_it_is_waited_for(started, capsys):
    run = started(f"say('note', text='hello'); {WAITS}")
    next(iter(run))
    with pytest.raises(TimeoutError):
        run.wait(0.01)
    run.stop()
    run.wait()
    assert capsys.readouterr().err.count("hello") == 1


def test_figures_are_those_of_the_updates_each_under_one_name(started, monkeypatch):
    run = started(
        "say('phase', text='x')\n"
        "say('metrics', session='s', update=1, loss=0.5, rewards={'a': 1.0}, each=[1])\n"
        "say('eval', update=1)"
    )
    run.wait(show=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert run.metrics() == [{"update": 1, "time": 1.0, "loss": 0.5, "rewards/a": 1.0}]
