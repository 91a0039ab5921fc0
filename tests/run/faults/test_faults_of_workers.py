"""Workers and the evaluator that die, halt or misbehave: the run goes on, and every group trains once."""

import contextlib
import random
import signal

import pytest
from guests import CROWD_S, guests_of
from runs import kill, wait_until

#: Where a worker is when it dies: in a step of sampling, between scoring and sending, between sending and the ack.
MOMENTS = ("worker.sampling", "worker.scored", "worker.sent")


def test_a_worker_killed_at_every_moment_of_a_lease(start_run):
    run = start_run(max_updates=100_000, save_steps=100, workers=2, eval_every_updates=0)
    for moment in MOMENTS:
        run.arm(moment, "kill")
        run.wait_for_failure(moment)
    run.wait_for_update(run.updates() + 2)
    run.stop_well()
    assert len(run.records("worker", state="lost", why="its process ended")) == len(MOMENTS)


@pytest.mark.faults
def test_a_worker_stopped_and_continued(start_run):
    run = start_run(environment={"GRPO_ACTORS_LOST_S": "3"}, max_updates=100_000, workers=2, save_steps=100)
    stopped = run.child("rollout-0")
    kill(stopped, signal.SIGSTOP)
    run.wait_for("worker", worker="rollout-0", state="lost")
    run.wait_for_update(run.updates() + 3)
    with contextlib.suppress(ProcessLookupError):  # replaced meanwhile
        kill(stopped, signal.SIGCONT)
    run.wait_for_update(run.updates() + 3)
    run.stop_well()


@pytest.mark.faults
def test_an_evaluator_killed_with_a_score_that_nobody_has_seen(start_run):
    run = start_run(max_updates=12, eval_every_updates=4, save_steps=0)
    run.arm("evaluator.scored", "kill")
    run.wait_for_failure("evaluator.scored")
    run.end_well()
    assert sorted(record["update"] for record in run.records("eval")) == [0, 4, 8, 12]


@pytest.mark.faults
def test_eight_attach_four_die_and_four_more_attach(start_run):
    run, names = start_run(max_updates=100_000, save_steps=500, eval_every_updates=0), list("abcdefghijkl")
    with guests_of(run) as guests:
        guests.attach(*names[:8])
        guests.wait_until_joined(*names[:8])
        guests.kill(*names[:4])
        guests.attach(*names[8:])
        # They take turns, so none is left without leases.
        wait_until(lambda: set(names[4:]) <= {worker for *_, worker in run.ledger()}, "all deliver", CROWD_S)
        guests.let_no_more_in()
        run.stop_well()


@pytest.mark.faults
def test_a_hundred_workers_killed_at_random_moments(start_run, note_figures):
    """They attach two at a time: an own worker would pause for up to 30 s before its next start."""
    run = start_run(max_updates=100_000, save_steps=500, eval_every_updates=0, max_staleness=1)
    rng, killed = random.Random(0), [f"mortal-{number}" for number in range(100)]
    with guests_of(run) as guests:
        guests.attach(killed[0])
        for name, following in zip(killed, [*killed[1:], "survivor"], strict=True):
            guests.attach(following)
            guests.wait_until_joined(name)
            # From the first look at its weights to a few delivered groups.
            run.wait_for_update(run.updates() + rng.randrange(4))
            guests.kill(name)
        wait_until(
            lambda: {r["worker"] for r in run.records("worker", state="lost")} == set(killed), "missed"
        )
        guests.let_no_more_in()
        run.stop_well()
    trained = [lease for lease, *_ in run.ledger()]
    aside = [r for r in run.records("alarm") if r["name"] == "problem set aside"]
    note_figures(
        f"{len(killed)} workers killed: {len(trained)} groups trained, {len(trained) - len(set(trained))} of them twice, "
        f"{max(trained) + 1 - len(set(trained)) - len(aside)} lost, {len(aside)} set aside with an alarm"
    )


#: A reward that fails in another way with texts of another length; for most, it does not: always would end the run.
BAD_REWARD = """
import os, signal, time

def score(completions, **columns):
    kind = sum(len(completion[0]["content"]) for completion in completions) % 36
    if kind == 0:
        raise ValueError("no")
    if kind == 1:
        os._exit(3)
    if kind == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == 3:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    if kind == 4:
        return []
    worth = {5: "one", 6: None, 7: float("nan"), 8: 1e300, 9: [1.0], 10: -float("inf")}.get(kind, 1.0)
    return [worth] * len(completions)
"""


@pytest.mark.faults
def test_a_reward_that_fails_in_every_way(start_run, tmp_path):
    (tmp_path / "bad.py").write_text(BAD_REWARD)
    rewards = f'reward.functions={{correctness=1.0, "{tmp_path}/bad.py:score"=1.0}}'
    run = start_run("--set", rewards, max_updates=40, workers=2, eval_every_updates=0, reward_timeout_s=0.5)
    run.end_well()
    assert run.exit_codes == [0]
