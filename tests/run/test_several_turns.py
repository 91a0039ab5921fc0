"""Whole runs whose completions have several turns: curves, masks, resume, replay, and weights adopted between turns."""

import json
import re
import signal
from collections.abc import Iterator

import pytest
from commands import launch_here
from runs import Run, new_run

from grpo_actors.config import ModelConfig
from grpo_actors.policy.model import load_base

ENVIRONMENT = '''
def asks_again(messages, answer, **columns):
    """Reply to every first answer, with a text that depends on it."""
    if sum(message["role"] == "assistant" for message in messages) > 1:
        return None
    return f"{len(messages[-1]['content'])}?"
'''
SETTINGS = {
    "environment": "again.py:asks_again",
    "max_new_tokens": 48,
    "record_groups": True,
    "workers": 1,
    "max_updates": 4,
}


def turns_run(**settings):
    return new_run(**SETTINGS | settings)


def with_environment(run):
    (run.folder.parent / "again.py").write_text(ENVIRONMENT)
    return run


@pytest.fixture(scope="module")
def whole() -> Iterator[Run]:
    with turns_run(max_staleness=0) as run:
        assert with_environment(run).run() == 0, run.stderr
        yield run


def groups(run):
    return [json.loads(line) for line in (run.folder / "groups.jsonl").read_text().splitlines()]


def test_completions_have_two_turns_with_the_environments_tokens_marked_between(whole):
    completions = [completion for group in groups(whole) for completion in group["completions"]]
    two = [c for c in completions if c["inserted"]]
    assert len(two) > len(completions) / 2
    decode = load_base(ModelConfig()).decode
    for c in two:
        [start, stop] = c["inserted"]
        assert set(c["logprobs"][start:stop]) == {0.0}
        assert all(logprob != 0.0 for logprob in c["logprobs"][:start])
        reply = r"<\|end\|><\|user\|>(\d+)\?<\|end\|><\|assistant\|>"
        first, length, last = re.fullmatch(f"(.*){reply}(.*)", decode(c["tokens"]), re.DOTALL).groups()
        assert (int(length), last) == (len(first), decode(c["tokens"][stop:]))


def test_metrics_report_turns_and_a_worker_that_agrees_with_the_learner(whole):
    for record in whole.records("metrics"):
        assert 1.0 < record["turns_mean"] <= 2.0
        assert record["logprob_gap_max"] < 1e-3
        assert record["grad_norm"] is not None
    assert whole.records("eval")[-1]["score"]["measure"]["problems"] == 4


def test_the_rate_of_rollout_is_that_of_sampled_tokens(whole):
    records = whole.records("metrics")
    # On-policy, so all groups that arrived by the last update have trained.
    arrived = sum(record["rollout_tokens_per_s"] * record["update_s"] for record in records)
    sampled = sum(
        len(c["tokens"]) - sum(c["inserted"][1::2]) + sum(c["inserted"][::2])
        for group in groups(whole)
        for c in group["completions"]
    )
    assert arrived == pytest.approx(sampled) == pytest.approx(sum(record["tokens"] for record in records))


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(whole):
    with turns_run(max_staleness=0, eval_every_updates=0) as run:
        with_environment(run).start()
        run.wait_for_update(1)
        run.signal(signal.SIGINT)
        assert run.end() == 0
        assert run.updates() < 4
        assert run.run() == 0, run.stderr
        assert run.curve() == whole.curve()
        assert groups(run) == groups(whole)


@pytest.mark.slow
def test_weights_that_are_taken_in_between_go_with_turns():
    with turns_run(in_flight_updates=True, max_staleness=2, batch_groups=2) as run:
        assert with_environment(run).run() == 0, run.stderr
        assert all(record["turns_mean"] > 1.0 for record in run.records("metrics"))
        assert max(record["logprob_gap_max"] for record in run.records("metrics")) < 1.0


def test_a_missing_environment_is_refused_before_anything_starts():
    with turns_run(environment="calculater") as run:
        done = launch_here(*run.launch_arguments())
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert (
            "data.environment: 'calculater' is not a built-in environment; did you mean 'calculator'?" in line
        )
