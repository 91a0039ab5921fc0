"""The columns of a problem on their way: from the data over the wire to the function."""

import math
from pathlib import Path

from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.policy.decoding.draw import Sample
from grpo_actors.rollout.results import problem_of, score_group
from grpo_actors.schedule.lease import Granted
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.scoring import Scorer, TrainerState
from grpo_actors.tasks.task import Problem
from grpo_actors.wire import messages as wire

FUNCTION = f"{Path(__file__).parent.parent / 'tasks' / 'trl_rewards.py'}:column_types"


def test_columns_keep_their_types_from_the_data_to_the_function():
    columns = {
        "answer": 31,
        "flag": True,
        "whole": 2**70,
        "part": math.nan,
        "nothing": None,
        "nested": {"list": [1, 2.5, "x"]},
    }
    problem = Problem(
        "p", ({"role": "user", "content": "?"},), "31", columns, text_prompt=True, mathematics=True
    )
    supply = Supply([problem], ProblemOrder(1, 0, shuffle=False), 0, 2, 9, lambda _: [1], rules=None)
    grant = wire.Grant(leases=[supply.lease_message(Granted(0, 1, 0, 5))])
    [lease] = wire.decode(wire.from_learner, wire.encode(grant)).leases
    arrived = problem_of(lease)
    assert (arrived.text_prompt, arrived.mathematics) == (True, True)
    with Scorer({FUNCTION: 1.0}, timeout_s=60) as scorer:
        scores = scorer.score(arrived, ["a", "b"])
    assert scores.failures == {}
    assert scores.rewards[FUNCTION] == [1.0, 1.0]


def test_a_group_has_what_its_lease_its_samples_and_its_rewards_say(tiny):
    lease = wire.Lease(
        lease=5,
        attempt=2,
        token=9,
        min_version=3,
        problem_id="p",
        prompt=wire.ints([1]),
        seeds=[1, 2, 3],
        messages=[{"role": "user", "content": "?"}],
        answer="31",
        columns="{}",
        epoch=4,
    )
    failures = (None, "it broke", "it broke again")
    samples = [Sample([60 + i], [-0.5], [3 + i], failure=failure) for i, failure in enumerate(failures)]
    with Scorer({"correctness": 1.0}, timeout_s=60) as scorer:
        group = score_group(lease, samples, tiny, scorer, total_updates=40, sampling_s=0.25)
        # A group is as old as the first token of its first completion.
        assert scorer.trainer_state == TrainerState(3, 40, 4)
    assert (group.lease, group.attempt, group.token, group.sampling_s) == (5, 2, 9, 0.25)
    assert [wire.read_ints(completion.tokens) for completion in group.completions] == [[60], [61], [62]]
    assert [completion.rewards["correctness"] is None for completion in group.completions] == [
        False,
        True,
        True,
    ]
    assert group.failures == {"environment": "it broke"}
