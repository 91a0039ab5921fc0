"""A run over TCP: who joins with a key, who does not, and what happens to a key that is revoked."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from bounds import HANG_S
from runs import ROOT, Run, new_run, wait_until

pytestmark = pytest.mark.slow


def delivered(run: Run, worker: str) -> int:
    return sum(name == worker for *_, name in run.ledger())


def keys(run: Run, *arguments: str) -> str:
    command = [sys.executable, "-m", "grpo_actors.keys", "--keys-dir", run.settings["keys_dir"], *arguments]
    done = subprocess.run(
        command, cwd=run.folder.parent, env=run.environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def guarded_run() -> Iterator[Run]:
    """A run over TCP that a worker visits with a key, which is then revoked, and one without a key."""
    with new_run(max_updates=100_000, eval_every_updates=2, save_steps=1, workers=1, scheme="tcp") as run:
        run.settings["keys_dir"] = str(run.folder.parent / "keys")
        run.start()
        wait_until((run.folder / "endpoints.json").exists, "the learner listens")
        run.mode = (run.folder / "run.key").stat().st_mode & 0o777
        run.endpoints = json.loads((run.folder / "endpoints.json").read_text())
        control = run.endpoints["control"]
        stranger = run.attach("--connect", control, "--name", "stranger")
        assert "laptop.key" in keys(run, "new", "laptop")
        guest = run.attach("--connect", control, "--key", "laptop.key", "--name", "guest")
        run.stranger_exit, run.stranger_said = stranger.wait(HANG_S), stranger.stderr_text()
        wait_until(lambda: delivered(run, "guest") >= 1, "a group of the worker with a key")
        run.listed = keys(run, "list")
        keys(run, "revoke", "laptop")
        run.guest_exit, run.guest_said = guest.wait(HANG_S), guest.stderr_text()
        run.guest_lost = run.wait_for("worker", worker="guest", state="lost")
        here = run.attach("--attach", str(run.folder), "--name", "here")
        wait_until(
            lambda: delivered(run, "here") >= 1, "a group of the worker by --attach, which needs no file"
        )
        here.send_signal(signal.SIGINT)
        assert here.wait(HANG_S) == 0
        run.here_said = here.stderr_text()
        run.scored = run.wait_for("eval", update=2)
        run.signal(signal.SIGINT)
        assert run.end() == 0, run.stderr
        yield run


def test_the_runs_own_processes_share_a_key_that_only_their_user_can_read(guarded_run):
    assert guarded_run.mode == 0o600
    assert "rollout-0" in {worker for *_, worker in guarded_run.ledger()}
    assert guarded_run.scored["checkpoint"] == "checkpoint-2"  # the evaluator has it too


def test_the_run_names_the_command_for_another_host(guarded_run):
    join = f"grpo worker --connect {guarded_run.endpoints['control']} --key FILE"
    assert guarded_run.endpoints["join"] == join
    assert join in guarded_run.stderr
    told, made = guarded_run.here_said.splitlines()[0].split("  # FILE: ")
    assert told == f"from another host: {join}"
    assert re.search(r"grpo(_actors)? keys new NAME$", made)


def test_a_worker_without_a_key_is_told_how_to_get_one(guarded_run):
    assert guarded_run.stranger_exit == 2
    (line,) = guarded_run.stranger_said.splitlines()
    assert "needs a key: --key FILE, made by grpo keys new NAME" in line


def test_a_revoked_key_ends_its_worker_at_once(guarded_run):
    assert guarded_run.listed.startswith("laptop  worker  since ")
    assert guarded_run.guest_exit == 2
    assert "the key 'laptop' with the role 'worker' is not let in here" in guarded_run.guest_said
    assert guarded_run.guest_lost["why"] == "its key was revoked"


def test_a_run_with_keys_leaves_none_in_its_folder(guarded_run):
    guarded_run.assert_nothing_left()
    assert not (guarded_run.folder / "run.key").exists()


def test_the_keys_command_runs_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "grpo_actors.keys", "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "revoke" in done.stdout
