"""Processes that die or hang in the middle of a run, by real signals."""

import signal
from collections.abc import Iterator

import pytest
from runs import Run, kill, new_run, wait_until


def nth(run: Run, count: int, **fields) -> dict:
    """The worker's record of that kind, once it is there."""
    told = wait_until(
        lambda: run.records("worker", worker="rollout-0", **fields)[count - 1 :], f"{count} × {fields}"
    )
    return told[0]


@pytest.fixture(scope="module")
def bereaved_run() -> Iterator[Run]:
    """The only worker is killed twice, the evaluator once; the run goes on to its end."""
    with new_run(max_updates=12, workers=1, eval_every_updates=4, save_steps=0) as run:
        run.start()
        run.killed_at, run.lost = [], []
        for update in (3, 6):
            run.wait_for_update(update)
            run.killed_at.append(kill(run.child("rollout-0")))
            run.lost.append(nth(run, len(run.killed_at), state="lost"))
            nth(run, len(run.killed_at) + 1, state="joined")
        run.wait_for("worker", worker="evaluator", state="joined")
        kill(run.child("evaluator"))
        assert run.end() == 0, run.stderr
        yield run


def test_a_killed_worker_is_missed_within_a_second(bereaved_run):
    for killed_at, lost in zip(bereaved_run.killed_at, bereaved_run.lost, strict=True):
        print(f"missed after {lost['time'] - killed_at:.3f} s")
        assert lost["why"] == "its process ended"
        assert lost["time"] - killed_at < 1.0


def test_it_is_started_again_with_a_pause_that_doubles(bereaved_run):
    said = [
        line
        for line in bereaved_run.stderr.splitlines()
        if line.startswith("rollout-0 was ended by signal 9")
    ]
    assert [line.rpartition("; ")[2] for line in said] == ["starts again in 1 s", "starts again in 2 s"]


def test_nothing_is_lost_and_nothing_trains_twice(bereaved_run):
    assert [lease for lease, *_ in bereaved_run.ledger()] == list(range(24))
    bereaved_run.assert_told_without_gap()


def test_no_problem_is_set_aside_for_the_deaths_of_two_workers(bereaved_run):
    assert bereaved_run.records("alarm") == []


def test_a_killed_evaluator_is_started_again_and_scores_every_checkpoint(bereaved_run):
    assert any(
        line.startswith("evaluator was ended by signal 9") for line in bereaved_run.stderr.splitlines()
    )
    assert sorted(record["update"] for record in bereaved_run.records("eval")) == [0, 4, 8, 12]


def test_a_run_with_deaths_leaves_nothing(bereaved_run):
    bereaved_run.assert_nothing_left()


@pytest.mark.slow
def test_a_worker_that_hangs_is_missed_and_its_late_result_does_no_harm(make_run):
    run = make_run(max_updates=100_000, workers=2, eval_every_updates=0, save_steps=0)
    run.environment["GRPO_ACTORS_LOST_S"] = "3"
    run.start("--set", "reward_timeout_s=0.1")
    run.wait_for_update(2)
    hung = run.child("rollout-0")
    kill(hung, signal.SIGSTOP)
    lost = run.wait_for("worker", worker="rollout-0", state="lost")
    assert lost["why"].startswith("silent for ")
    before = run.updates()
    run.wait_for_update(before + 5)
    kill(hung, signal.SIGCONT)
    delivered = sum(worker == "rollout-0" for *_, worker in run.ledger())
    wait_until(
        lambda: sum(worker == "rollout-0" for *_, worker in run.ledger()) > delivered + 2,
        "it is back at work",
    )
    run.signal(signal.SIGINT)
    assert run.end() == 0
    leases = [lease for lease, *_ in run.ledger()]
    assert leases == list(range(len(leases)))
    run.assert_nothing_left()


@pytest.mark.slow
def test_twenty_deaths_lose_nothing(make_run):
    run = make_run(max_updates=100_000, workers=2, eval_every_updates=0, save_steps=0, max_staleness=1)
    run.start()
    run.wait_for_update(1)
    for number in range(20):
        # Attached ones: no back-off stands between two deaths.
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
