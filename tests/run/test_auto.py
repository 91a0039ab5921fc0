"""``rollout.workers = "auto"`` in real runs: a second worker is started, samples, and stays or is stopped by the rule."""

import json
import os
import re
import signal
from collections.abc import Iterator

import pytest
from runs import Run, kill, living, new_run, wait_until

from grpo_actors.rundir.decisions import kept_workers

#: Endless, on-policy and without an evaluator: the learner waits for each group that is sampled.
SETTINGS = {
    "max_updates": 100_000,
    "max_staleness": 0,
    "eval_every_updates": 0,
    "save_steps": 0,
    "workers": "auto",
}


@pytest.fixture(scope="module", autouse=True)
def _two_cores() -> Iterator[None]:
    """Use two cores: with more, a run's threads, and so its last bits, would depend on how many workers fit."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs Linux")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    yield
    os.sched_setaffinity(0, cores)


def decisions(run: Run) -> list[dict]:
    path = run.folder / "workers.json"
    return json.loads(path.read_text())["decisions"] if path.exists() else []


@pytest.fixture(scope="module")
def two_worker_run(_two_cores) -> Iterator[Run]:
    """Room for two workers; stopped some updates after the second was judged."""
    with new_run(**SETTINGS) as run:
        run.environment["GRPO_ACTORS_MOST_WORKERS"] = "2"
        run.start()
        wait_until(lambda: decisions(run), "a second worker is asked for")
        run.second = run.child("rollout-1")
        wait_until(lambda: len(decisions(run)) > 1, "it is judged")
        if decisions(run)[1]["workers"] == 1:
            run.wait_for("worker", worker="rollout-1", state="left")
            wait_until(lambda: not living([run.second]), "it is gone")
        run.wait_for_update(run.updates() + 4)
        run.stays = bool(living([run.second]))
        run.signal(signal.SIGINT)
        assert run.end() == 0, run.stderr
        yield run


def test_a_worker_is_added_because_the_learner_waits_and_the_line_says_how_much(two_worker_run):
    added = decisions(two_worker_run)[0]
    assert added["workers"] == 2
    line = next(line for line in two_worker_run.stderr.splitlines() if "1 → 2" in line)
    waits = re.fullmatch(
        r"rollout workers: 1 → 2 \(the learner waits (\d+)% of an update of \d\.\d\d s\)", line
    )
    assert waits
    assert int(waits[1]) > 10


def test_the_added_worker_takes_part(two_worker_run):
    assert {worker for *_, worker in two_worker_run.ledger()} == {"rollout-0", "rollout-1"}


def test_each_decision_is_among_the_records(two_worker_run):
    records = [(r["update"], r["workers"], r["reason"]) for r in two_worker_run.records("headcount")]
    assert records == [(d["update"], d["workers"], d["reason"]) for d in decisions(two_worker_run)]


def test_it_stays_where_the_rate_rose_by_a_tenth_and_is_stopped_otherwise(two_worker_run):
    judged = decisions(two_worker_run)[1]
    gain = float(re.search(r"one worker more gave (\d\.\d\d) times the rate", judged["reason"])[1])
    assert judged["workers"] == kept_workers(two_worker_run.folder)
    if gain != 1.1:  # rounded
        assert judged["workers"] == (2 if gain > 1.1 else 1)
    assert two_worker_run.stays == (judged["workers"] == 2)
    assert two_worker_run.records("worker", state="lost") == []


def test_each_lease_trains_once_while_workers_come_and_go(two_worker_run):
    leases = [lease for lease, *_ in two_worker_run.ledger()]
    assert leases == list(range(len(leases)))
    two_worker_run.assert_no_gap_in_records()
    two_worker_run.assert_nothing_left()


@pytest.mark.slow
def test_on_policy_a_run_is_the_same_to_the_bit_while_workers_come_and_go(two_worker_run, make_run):
    """Guests leave in the middle of a batch, as a stopped worker does; the two runs have different workers."""
    run = make_run(**SETTINGS | {"workers": 1})
    run.environment["OPENBLAS_NUM_THREADS"] = "1"  # guests get what the supervisor gives its own workers
    run.start()
    run.wait_for_update(1)
    for number in range(3):
        name = f"guest-{number}"
        guest = run.attach("--attach", str(run.folder), "--name", name)
        wait_until(lambda name=name: any(worker == name for *_, worker in run.ledger()), f"{name} delivers")
        kill(guest.pid, signal.SIGTERM)
        run.wait_for("worker", worker=name, state="left")
    run.wait_for_update(two_worker_run.updates())
    run.signal(signal.SIGINT)
    assert run.end() == 0
    updates = two_worker_run.updates()
    assert run.curve()[:updates] == two_worker_run.curve()[:updates]


def test_a_continued_run_begins_with_the_number_that_was_kept_and_one_that_dies_stays_away(two_worker_run):
    (two_worker_run.folder / "workers.json").write_text('{"kept": 2}')
    two_worker_run.start()
    kill(two_worker_run.child("rollout-1"))
    wait_until(lambda: "rollout workers: 2 → 1" in two_worker_run.stderr, "its death is reported")
    two_worker_run.wait_for_update(two_worker_run.updates() + 1)
    two_worker_run.signal(signal.SIGINT)
    assert two_worker_run.end() == 0
    lines = [line for line in two_worker_run.stderr.splitlines() if line.startswith("rollout")]
    assert lines == [
        "rollout workers: 2 to begin with, at most 2 (GRPO_ACTORS_MOST_WORKERS says so)",
        "rollout workers: 2 → 1 (a worker was ended by signal 9)",
    ]
    assert kept_workers(two_worker_run.folder) == 1
    assert two_worker_run.records("headcount")[-1]["reason"] == "a worker was ended by signal 9"
