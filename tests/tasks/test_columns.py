"""Functions that need columns which the data lacks are refused before a run."""

import pytest

from grpo_actors.errors import RewardError
from grpo_actors.tasks.columns import check_columns
from grpo_actors.tasks.task import Problem, Task


def problem(**columns):
    return Problem("id", ({"role": "user", "content": "?"},), "1", columns)


def refusal(needs, train, held_out=(), applies=lambda *_: True):
    with pytest.raises(RewardError) as caught:
        check_columns(needs, Task(train, held_out), "reward.functions", applies=applies)
    return str(caught.value)


def check(needs, train, held_out=(), applies=lambda *_: True):
    check_columns(needs, Task(train, held_out), "reward.functions", applies=applies)


def test_missing_columns_are_named_with_those_that_there_are():
    data = [problem(gold=1, unit="m")]
    assert refusal({"f.py:f": ["gold", "level"]}, data) == (
        "reward.functions: 'f.py:f' needs the column 'level'; the training data has gold, unit; "
        "add it, or give the argument a default"
    )
    assert "needs the columns 'a', 'b'; the training data has gold, unit" in refusal({"f": ["a", "b"]}, data)
    assert "the training data has none" in refusal({"f": ["a"]}, [problem()])
    assert "the evaluation data has unit" in refusal({"f": ["gold"]}, data, [problem(unit="m")])
    check({"f": ["gold"], "g": []}, data, data)


def test_a_column_that_some_problems_have_is_enough():
    check({"f": ["a", "b"]}, [problem(a=1), problem(), problem(b=2)])
    assert "has a, b" in refusal({"f": ["c"]}, [problem(a=1), problem(b=2)])


def test_no_problems_need_no_column():
    check({"f": ["a"]}, [problem(a=1)], [])


def test_only_a_function_that_gets_the_problems_of_a_source_needs_their_columns():
    check({"f": ["a"]}, [problem()], applies=lambda name, source: (name, source) != ("f", ""))
    assert "'g' needs" in refusal({"f": ["a"], "g": ["a"]}, [problem()], applies=lambda name, _: name == "g")
