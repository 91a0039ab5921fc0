"""A whole run with a worker that reports wrong log-probs: it is found out, and the run ends without it."""

import signal

import pytest
from runs import new_run, wait_until

#: A worker that is honest in everything but its log-probs: 5 nats less than the policy's.
LIAR = """
from dataclasses import replace
from grpo_actors.process import run_command
from grpo_actors.rollout import worker
from grpo_actors.rollout.__main__ import main

honest = worker.score_group

def lying(lease, samples, *args, **kwargs):
    lies = [replace(sample, logprobs=[p - 5 for p in sample.logprobs]) for sample in samples]
    return honest(lease, lies, *args, **kwargs)

worker.score_group = lying
run_command(main)
"""


@pytest.mark.slow
def test_a_worker_with_wrong_log_probs_is_quarantined_and_the_run_goes_on():
    settings = {"num_generations": 8, "batch_size": 4, "max_new_tokens": 32, "skip_zero_advantage": False}
    with new_run(**settings, workers=1, max_updates=100_000, eval_every_updates=0, save_steps=0) as run:
        (run.folder.parent / "liar.py").write_text(LIAR)
        run.start().wait_for_update(1)
        run._spawn(["liar.py", "--attach", str(run.folder), "--name", "liar"])
        [alarm] = wait_until(lambda: run.records("alarm"), "the liar is found out")
        assert alarm["name"] == "worker quarantined"
        assert alarm["text"].startswith("liar gets no more leases: log-probs ")
        found = alarm["update"]
        run.wait_for_update(found + 3)
        run.signal(signal.SIGINT)
        assert run.end() == 0, run.stderr
        ledger = run.ledger()
        assert [lease for lease, *_ in ledger] == list(range(len(ledger)))
        by_update = {r["update"]: {worker for *_, worker in r["ledger"]} for r in run.records("metrics")}
        assert "liar" in by_update[found]
        assert all(workers == {"rollout-0"} for update, workers in by_update.items() if update > found)
        gaps = [r["logprob_gaps"] for r in run.records("metrics") if "liar" in r["logprob_gaps"]]
        assert len(gaps) >= 3
        assert all(4 < gap["liar"] < 6 for gap in gaps)
        assert all(gap.get("rollout-0", 0.0) < 0.1 for gap in gaps)
        assert {r["state"] for r in run.records("worker") if r["worker"] == "liar"} >= {
            "joined",
            "quarantined",
        }
