"""Workers started by hand, which join and leave during a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bounds import HANG_S
from runs import Run, kill, new_run, wait_until

from grpo_actors.policy.locate import EMBEDDED

#: Runs a command as a shell does: in a process group of its own.
OWN_GROUP = [sys.executable, "-c", "import os, sys; os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])"]


def delivered(run: Run, worker: str) -> int:
    return sum(name == worker for *_, name in run.ledger())


def assert_exactly_once(run: Run) -> None:
    leases = [lease for lease, *_ in run.ledger()]
    assert leases == list(range(len(leases)))


@pytest.fixture(scope="module")
def visited_run() -> Iterator[Run]:
    """A run that two workers visit: one, of two ranks, leaves by Ctrl-C, one is killed; then SIGTERM stops the run."""
    with new_run(max_updates=100_000, eval_every_updates=0, save_steps=0, workers=1) as run:
        run.model = run.folder.parent / "model"
        shutil.copytree(EMBEDDED, run.model)
        run.start("--set", f"model_name={run.model}")
        run.wait_for_update(1)
        endpoints = json.loads((run.folder / "endpoints.json").read_text())
        polite = run.attach("--attach", str(run.folder), "--name", "polite", "--ranks", "2", within=OWN_GROUP)
        rude = run.attach("--connect", endpoints["control"], "--name", "rude")
        wait_until(lambda: delivered(run, "rude") >= 2, "groups of the worker by --connect")
        run.killed_at = kill(rude.pid)
        run.rude_lost = run.wait_for("worker", worker="rude", state="lost")
        wait_until(lambda: delivered(run, "polite") >= 2, "groups of the worker by --attach")
        os.killpg(polite.pid, signal.SIGINT)  # a terminal sends it to all ranks
        run.polite_exit = polite.wait(HANG_S)
        run.polite_said = polite.stderr_text()
        run.polite_left = run.wait_for("worker", worker="polite", state="left")
        put_other_weights(run.model)
        other = run.attach("--attach", str(run.folder), "--name", "stranger")
        run.stranger_exit = other.wait(HANG_S)
        run.stranger_said = other.stderr_text()
        run.signal(signal.SIGTERM)
        assert run.end() == 0, run.stderr
        yield run


def test_a_worker_attached_by_folder_or_by_address_delivers(visited_run):
    assert {"rollout-0", "polite", "rude"} <= {worker for *_, worker in visited_run.ledger()}


def test_ctrl_c_makes_an_attached_worker_leave_cleanly(visited_run):
    assert visited_run.polite_exit == 0
    joined, left = visited_run.polite_said.splitlines()
    assert joined == "joined smoke-test as polite; Ctrl-C leaves it"
    groups = visited_run.polite_left["groups"]
    assert left == f"left after {groups} groups: asked to leave"


def test_a_killed_worker_is_seen_within_a_second(visited_run):
    # Noticed by its process id, or a little earlier, if a lease was just on its way to it.
    assert visited_run.rude_lost["why"] in {"its process ended", "its connection is closed or full"}
    assert visited_run.rude_lost["time"] - visited_run.killed_at < 1.0


def test_what_a_worker_that_left_or_died_had_not_delivered_is_done_by_another(visited_run):
    assert_exactly_once(visited_run)
    visited_run.assert_no_gap_in_records()


def test_sigterm_saves_a_run(visited_run):
    assert visited_run.checkpoints() == [visited_run.updates()]
    (stop,) = visited_run.records("stop")
    assert stop["reason"] == f"asked to stop after update {visited_run.updates()}"
    assert stop["exit_code"] == 0


def test_a_run_that_was_visited_leaves_nothing(visited_run):
    visited_run.assert_nothing_left()


def test_attaching_to_a_run_that_is_over_is_one_line_and_exit_code_2(visited_run):
    worker = visited_run.attach("--attach", str(visited_run.folder))
    assert worker.wait(HANG_S) == 2
    (line,) = worker.stderr_text().splitlines()
    assert line.startswith(f"error: {visited_run.folder}: no run is live here")


def test_attaching_to_a_run_whose_process_is_gone_does_not_wait(visited_run):
    with subprocess.Popen(["true"]) as process:
        process.wait()
    path = visited_run.folder / "endpoints.json"
    path.write_text(json.dumps({"control": "ipc:///x", "weights": "", "events": "", "pid": process.pid}))
    try:
        worker = visited_run.attach("--attach", str(visited_run.folder))
        assert worker.wait(HANG_S) == 2
    finally:
        path.unlink()
    (line,) = worker.stderr_text().splitlines()
    assert f"no run is live here (its process {process.pid} is gone)" in line


def test_an_address_where_nobody_answers_is_given_up_after_the_patience(visited_run):
    worker = visited_run.attach("--connect", f"ipc://{visited_run.temporary}/nobody", "--patience", "0.5")
    assert worker.wait(HANG_S) == 2
    (line,) = worker.stderr_text().splitlines()
    assert line.endswith("no learner answered within 0.5 s; is the run live?")


def test_ctrl_c_while_a_worker_still_imports_or_waits_is_quiet(visited_run):
    worker = visited_run.attach("--connect", f"ipc://{visited_run.temporary}/nobody", "--patience", "60")
    # Not before: during its own start, the Python interpreter would handle the signal.
    wait_until(lambda: handles_interrupts(worker.pid), "it handles signals")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(HANG_S) == 0
    assert worker.stderr_text() == ""


def handles_interrupts(pid: int) -> bool:
    """Return whether a process handles SIGINT by more than Python's default: it catches SIGTERM too (Linux)."""
    path = Path(f"/proc/{pid}/status")
    if not path.exists():
        pytest.skip("needs /proc")
    status = path.read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def put_other_weights(folder) -> None:
    """Turn the model into another fine-tune: change one bit in each of the last two bytes of each tensor."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    for tensor in json.loads(data[8 : 8 + header]).values():
        if "data_offsets" in tensor:
            data[8 + header + tensor["data_offsets"][0]] ^= 1
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def test_a_worker_with_another_model_refuses_by_name(visited_run):
    assert visited_run.stranger_exit == 2
    (line,) = visited_run.stranger_said.splitlines()
    assert f"model.model_name: '{visited_run.model}' is not the learner's model: weights is" in line
    assert not delivered(visited_run, "stranger")


@pytest.mark.slow
def test_a_worker_that_is_sent_home_says_why_and_exits_with_0(make_run):
    run = make_run(max_updates=100_000, eval_every_updates=0, save_steps=0, workers=0)
    run.start()
    run.wait_for_update(1)
    worker = run.attach("--attach", str(run.folder), "--name", "guest")
    wait_until(lambda: delivered(run, "guest"), "a group of the attached worker")
    run.signal(signal.SIGINT)
    assert worker.wait(HANG_S) == 0
    assert worker.stderr_text().splitlines()[-1].endswith(": the run is over")
    assert run.end() == 0


@pytest.mark.slow
def test_a_worker_whose_run_was_killed_goes_after_its_patience(make_run):
    run = make_run(max_updates=100_000, eval_every_updates=0, save_steps=0, workers=0)
    run.start()
    run.wait_for_update(1)
    worker = run.attach("--attach", str(run.folder), "--name", "faithful", "--patience", "2")
    wait_until(lambda: delivered(run, "faithful"), "a group of the attached worker")
    run.signal(signal.SIGKILL)
    run.end()
    assert worker.wait(HANG_S) == 2
    assert worker.stderr_text().splitlines()[-1].endswith("the learner has been gone for 2 s")
