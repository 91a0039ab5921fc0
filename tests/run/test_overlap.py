"""Runs whose workers take new weights in the middle of completions."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from runs import Run, kill, new_run

#: A hot policy never ends its answers, so sampling is the bottleneck: versions arrive while groups are under way.
SETTINGS = {
    "in_flight_updates": True,
    "max_staleness": 2,
    "workers": 2,
    "temperature": 3.0,
    "max_new_tokens": 80,
    "max_updates": 8,
    "save_steps": 4,
    "eval_every_updates": 0,
    "record_groups": True,
}


def groups(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "groups.jsonl").read_text().splitlines()]


def versions(group: dict[str, Any]) -> list[list[int]]:
    return [completion["versions"] for completion in group["completions"]]


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def in_flight_run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Kill a worker and later the learner while completions are under way, and start the run again."""
    with new_run(**SETTINGS, fine_tune_type=request.param) as run:
        run.start()
        run.wait_for_update(2)
        kill(run.child("rollout-0"))
        run.wait_for_update(5)
        kill(run.child("learner"))
        run.end()
        assert run.run() == 0, run.stderr
        yield run


def test_every_token_is_within_the_bound_and_versions_only_rise(in_flight_run):
    for group in groups(in_flight_run):
        # Update u trains version u - 1.
        for of_completion in versions(group):
            assert all(0 <= group["update"] - 1 - version <= 2 for version in of_completion)
            assert of_completion == sorted(of_completion)


def test_completions_of_several_versions_train(in_flight_run):
    changes = [
        after - before
        for group in groups(in_flight_run)
        for of_completion in versions(group)
        for before, after in pairwise(of_completion)
        if after != before
    ]
    assert changes
    assert in_flight_run.updates() == 8


def test_every_lease_is_consumed_once_and_in_order(in_flight_run):
    in_flight_run.assert_no_gap_in_records()
    assert [lease for lease, *_ in in_flight_run.ledger()] == list(range(16))
    in_flight_run.assert_nothing_left()


def test_completions_under_way_in_a_killed_worker_or_for_a_killed_learner_train_all_the_same(in_flight_run):
    assert [group["update"] for group in groups(in_flight_run)] == [1 + at // 2 for at in range(16)]
