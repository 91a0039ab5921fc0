"""The columns of a problem on their way: from the data over the wire to the function."""

import math
from pathlib import Path

from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.rollout.results import problem_of
from grpo_actors.schedule.lease import Granted
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.scoring import Scorer
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
