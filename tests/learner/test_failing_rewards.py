from grpo_actors.learner.failing_rewards import UPDATES, FailingRewards
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.tasks.task import Problem

WEIGHTS = {"judge": 1.0, "logged": 0.0}


def update(*failures):
    """Return the groups of an update; each failed for these rewards."""
    problem = Problem("p", ({"role": "user", "content": "q"},), "a")
    return [
        SampledGroup(0, 0, problem, [1], "w", [], failures=dict.fromkeys(f, f"no {n}"))
        for n, f in enumerate(failures)
    ]


ALL, SOME, NONE = update(["judge"], ["judge"]), update(["judge"], []), update([], [])


def checked(*updates):
    failing = FailingRewards(WEIGHTS)
    return [failing.check(groups) is not None for groups in updates]


def test_three_updates_in_a_row_without_any_value_end_the_run():
    assert UPDATES == 3
    assert checked(ALL, ALL, ALL) == [False, False, True]
    failing = FailingRewards(WEIGHTS)
    assert [failing.check(ALL) for _ in range(3)][
        -1
    ] == "judge failed for every completion of 3 updates: no 1"


def test_one_group_with_values_starts_the_count_again():
    assert checked(ALL, ALL, SOME, ALL, ALL, NONE, ALL, ALL, ALL) == [False] * 8 + [True]


def test_a_reward_without_a_weight_ends_nothing():
    assert checked(*[update(["logged"])] * 5) == [False] * 5
