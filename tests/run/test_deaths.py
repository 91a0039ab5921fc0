"""Processes that are killed or stopped in the middle of a run, by real signals."""

import signal
from collections.abc import Iterator

import pytest
from runs import Run, kill, new_run, wait_until


def nth(run: Run, count: int, **fields) -> dict:
    """Wait for the `count`-th record of the worker with these fields; return it."""
    found = wait_until(
        lambda: run.records("worker", worker="rollout-0", **fields)[count - 1 :], f"{count} × {fields}"
    )
    return found[0]


@pytest.fixture(scope="module")
def run_with_deaths() -> Iterator[Run]:
    """Kill the only worker twice and the evaluator once; its successor starts only when all updates are done."""
    with new_run(max_updates=12, workers=1, eval_every_updates=4, save_steps=0) as run:
        run.start()
        run.killed_at, run.lost = [], []
        for update in (3, 6):
            run.wait_for_update(update)
            run.killed_at.append(kill(run.child("rollout-0")))
            run.lost.append(nth(run, len(run.killed_at), state="lost"))
            nth(run, len(run.killed_at) + 1, state="joined")
        run.wait_for("worker", worker="evaluator", state="joined")
        killed = run.child("evaluator")
        kill(killed)
        late = wait_until(lambda: (pid := run.child("evaluator")) != killed and pid, "its successor")
        kill(late, signal.SIGSTOP)
        run.wait_for("checkpoint", update=12)
        kill(late, signal.SIGCONT)
        assert run.end() == 0, run.stderr
        yield run


@pytest.mark.gpu
def test_a_killed_worker_is_missed_by_its_end_and_not_by_its_silence(run_with_deaths):
    for killed_at, lost in zip(run_with_deaths.killed_at, run_with_deaths.lost, strict=True):
        print(f"missed after {lost['time'] - killed_at:.3f} s")
        assert lost["why"] == "its process ended"


def test_it_is_started_again_with_a_pause_that_doubles(run_with_deaths):
    lines = [
        line
        for line in run_with_deaths.stderr.splitlines()
        if line.startswith("rollout-0 was ended by signal 9")
    ]
    assert [line.rpartition("; ")[2] for line in lines] == ["starts again in 1 s", "starts again in 2 s"]


@pytest.mark.gpu
def test_nothing_is_lost_and_nothing_trains_twice(run_with_deaths):
    assert [lease for lease, *_ in run_with_deaths.ledger()] == list(range(24))
    run_with_deaths.assert_no_gap_in_records()


def test_no_problem_is_set_aside_for_the_deaths_of_two_workers(run_with_deaths):
    assert run_with_deaths.records("alarm") == []


def test_a_killed_evaluator_is_started_again_and_the_end_waits_until_it_has_scored_every_checkpoint(
    run_with_deaths,
):
    assert any(
        line.startswith("evaluator was ended by signal 9") for line in run_with_deaths.stderr.splitlines()
    )
    assert sorted(record["update"] for record in run_with_deaths.records("eval")) == [0, 4, 8, 12]


def test_a_run_with_deaths_leaves_nothing(run_with_deaths):
    run_with_deaths.assert_nothing_left()


def test_a_run_does_not_wait_for_an_evaluator_that_has_left_for_good(make_run):
    run = make_run(max_updates=2)
    run.arm("evaluator.scored", "stop")
    run.start()
    evaluator = run.wait_for_failure("evaluator.scored")  # at the base model
    kill(evaluator, signal.SIGTERM)
    kill(evaluator, signal.SIGCONT)
    assert run.end() == 0, run.stderr
    assert "not evaluated" in run.stderr


@pytest.mark.slow
def test_a_worker_that_hangs_is_missed_and_its_late_result_does_no_harm(make_run):
    """It was started by hand: the supervisor would end one of its own."""
    run = make_run(max_updates=100_000, workers=1, eval_every_updates=0, save_steps=0)
    run.environment["GRPO_ACTORS_LOST_S"] = "3"
    run.start("--set", "reward_timeout_s=0.1")
    run.wait_for_update(1)
    hung = run.attach("--attach", str(run.folder), "--name", "guest").pid
    # A peer that has sent no beat yet is loading its model, and has more time.
    wait_until(lambda: any(worker == "guest" for *_, worker in run.ledger()), "it delivers")
    kill(hung, signal.SIGSTOP)
    lost = run.wait_for("worker", worker="guest", state="lost")
    assert lost["why"].startswith("silent for ")
    before = run.updates()
    run.wait_for_update(before + 5)
    kill(hung, signal.SIGCONT)
    delivered = sum(worker == "guest" for *_, worker in run.ledger())
    wait_until(
        lambda: sum(worker == "guest" for *_, worker in run.ledger()) > delivered + 2,
        "it is back at work",
    )
    run.signal(signal.SIGINT)
    assert run.end() == 0
    leases = [lease for lease, *_ in run.ledger()]
    assert leases == list(range(len(leases)))
    run.assert_nothing_left()


@pytest.mark.slow
def test_many_deaths_lose_nothing(make_run):
    run = make_run(max_updates=100_000, workers=2, eval_every_updates=0, save_steps=0, max_staleness=1)
    run.start()
    run.wait_for_update(1)
    for number in range(6):
        # Attached workers: no pause between two deaths.
        worker = run.attach("--attach", str(run.folder), "--name", f"mortal-{number}")
        name = f"mortal-{number}"
        wait_until(lambda n=name: any(w == n for *_, w in run.ledger()), f"{name} delivers")
        kill(worker.pid)
    run.wait_for_update(run.updates() + 5)
    run.signal(signal.SIGINT)
    assert run.end() == 0
    leases = [lease for lease, *_ in run.ledger()]
    aside = [int(r["text"].rpartition("lease ")[2].rstrip(")")) for r in run.records("alarm")]
    assert sorted(leases + aside) == list(range(len(leases) + len(aside)))
    assert leases == sorted(leases)
