"""A run whose actors are killed at random for as long as `SOAK` says, and a clean one of the same length next to it.

    make soak SOAK=1800     # half an hour, then the clean run; prints the table

Every promise must hold afterwards, no process may have grown, and the two must have learnt alike.
"""

import math
import os
import random
import signal
import statistics
import time

import pytest
from runs import kill
from usage import Slope, Usage, actors

#: Seconds of faults. `make test-faults` runs a short one, so that this test keeps working.
SOAK_S = float(os.environ.get("SOAK", "60"))
#: From so many seconds on every actor is sure to be killed.
LONG_S = 1200.0
#: Mean seconds between two kills of an actor, in a long soak. A run must be able to train once between two of its starts.
MEAN_S = {"rollout-0": 90.0, "rollout-1": 90.0, "evaluator": 150.0, "learner": 240.0, "supervisor": 360.0}
#: A short one has some of each.
HASTE = max(1.0, 240.0 / SOAK_S)
#: Seconds between two looks at the processes.
LOOK_S = 2.0

#: An update is small, the rate is that of the quickstart: what is learnt within a hundred updates shows.
LEARNS = {
    "num_generations": 8,
    "batch_size": 4,
    "max_new_tokens": 32,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "save_steps": 4,
    "eval_every_updates": 24,
    "eval_subset_size": 32,
    "workers": 2,
}


@pytest.mark.faults
def test_a_soak_with_random_kills_of_every_actor(start_run, note_figures):
    rng = random.Random(0)
    run, usage, kills = start_run(**LEARNS, max_updates=1_000_000), Usage(), dict.fromkeys(MEAN_S, 0)
    end_s = time.monotonic() + SOAK_S
    while time.monotonic() < end_s:
        next_s = time.monotonic() + rng.expovariate(sum(1 / s for s in MEAN_S.values()) * HASTE)
        while time.monotonic() < min(next_s, end_s):
            usage.look(run)
            time.sleep(min(LOOK_S, max(0.0, next_s - time.monotonic())))  # the interval of a measurement
        (victim,) = rng.choices(list(MEAN_S), [1 / s for s in MEAN_S.values()])
        alive = actors(run)
        run.learners |= {pid for actor, pid in alive.items() if actor == "learner"}
        if victim in alive:
            kill(alive[victim])
            kills[victim] += 1
        if victim in ("learner", "supervisor") and victim in alive:
            assert run.end() in (128 + signal.SIGKILL, -signal.SIGKILL), run.stderr
            run.start()
    run.wait_for_update(run.updates() + 2)
    run.stop_well()

    clean, clean_usage = start_run(**LEARNS, max_updates=run.updates()), Usage()
    while clean.launched.poll() is None:
        clean_usage.look(clean)
        time.sleep(LOOK_S)  # the interval of a measurement
    clean.end_well()

    distance = Distance(rewards(run), rewards(clean))
    note_figures(report(run, kills, usage, clean_usage, distance))
    assert sum(kills.values()) > 0 if SOAK_S < LONG_S else all(kills.values()), kills
    assert abs(distance.in_errors) < 4, "it learns as the clean run does"
    for actor in clean_usage.actors:
        most, clean_most = usage.largest(actor), clean_usage.largest(actor)
        assert most.files <= clean_most.files + 20, f"{actor} leaves files open"
        assert most.threads <= clean_most.threads + 4, f"{actor} leaves threads"


def rewards(run) -> list[float]:
    return [record["reward_mean"] for record in run.records("metrics")]


class Distance:
    """The difference of the rewards of two runs over all their updates, and how much of it chance makes."""

    def __init__(self, faulty: list[float], clean: list[float]) -> None:
        differences = [a - b for a, b in zip(faulty, clean, strict=True)]
        self.means = statistics.fmean(faulty), statistics.fmean(clean)
        self.last = statistics.fmean(faulty[-20:]), statistics.fmean(clean[-20:])
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        self.error = spread / math.sqrt(len(differences))
        self.in_errors = statistics.fmean(differences) / self.error if self.error else 0.0


def report(run, kills, usage, clean_usage, distance) -> str:
    by_kill = ", ".join(f"{role} {n}" for role, n in kills.items())
    counts = f"{len(run.exit_codes)} starts, {run.updates()} updates, {len(run.ledger())} groups trained"
    learnt = f"reward: {distance.means[0]:.4f}, clean {distance.means[1]:.4f}"
    error = f"standard error of the difference {distance.error:.4f}"
    lines = [
        f"{SOAK_S:.0f} s, {sum(kills.values())} kills ({by_kill}), {counts}",
        f"{learnt} ({error}); last 20 updates {distance.last[0]:.3f}, clean {distance.last[1]:.3f}",
        f"{'':12}{'MB':>8}{'files':>7}{'threads':>9}   MB of its longest life, after a minute",
    ]
    for title, of in (("with kills", usage), ("clean", clean_usage)):
        lines.append(title)
        for actor in of.actors:
            most, slope = of.largest(actor), Slope.of(of.longest_life(actor), "memory_mb")
            lines.append(
                f"  {actor:10}{most.memory_mb:8.0f}{most.files:7}{most.threads:9}   {slope or 'too short'}"
            )
    return "\n".join(lines)
