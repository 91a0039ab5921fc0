import re
import sys

import pytest
from bounds import HANG_S

from grpo_actors.errors import RewardError
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem


@pytest.fixture(scope="module")
def values():
    """Return the rewards of completions of a problem with a given true answer."""
    pytest.importorskip("math_verify")
    with Scorer({"math_verify": 1.0}, timeout_s=HANG_S) as scorer:

        def score(true, *completions):
            scores = scorer.score(Problem("p", ({"role": "user", "content": "?"},), true), completions)
            assert scores.failures == {}
            return scores.rewards["math_verify"]

        yield score


@pytest.mark.parametrize(
    ("given", "true"),
    [
        ("0.5", "1/2"),
        (r"\frac{1}{2}", "1/2"),
        (r"$\frac{1}{2}$", "0.5"),
        ("1,000", "1000"),
        ("$18", "18"),
        ("1+2x", "2x+1"),
        (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        ("x = 3", "3"),
    ],
)
def test_equal_in_mathematics_is_right_however_it_is_written(values, given, true):
    assert values(true, f"<answer>{given}</answer>") == [1.0]


@pytest.mark.parametrize(
    ("given", "true"),
    [("2", "1/2"), ("2x+1", "2"), ("(2,1)", "(1,2)"), ("4 or 5", "5"), (r"\frac{", "3"), ("none", "3")],
)
def test_anything_else_is_wrong(values, given, true):
    assert values(true, f"<answer>{given}</answer>") == [0.0]


def test_without_tags_the_whole_completion_is_searched_for_an_answer(values):
    completions = ["so it is 7", r"so it is \boxed{7}", "3 and 4 make $7$.", "I do not know", ""]
    assert values("7", *completions) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_answer_in_tags_decides_whatever_stands_before_it(values):
    assert values("7", "it is 7 <answer>8</answer>", "it is 8 <answer>7</answer>") == [0.0, 1.0]


def test_an_answer_that_takes_forever_is_wrong_and_the_others_keep_their_values(values):
    assert values("7", "<answer>9^{9^{9}}</answer>", "<answer>7</answer>") == [0.0, 1.0]


def test_a_true_answer_that_is_no_mathematics_gives_no_value(values):
    assert values("", "<answer>7</answer>") == [None]


def test_without_the_library_there_is_one_line_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    cure = (
        "'math_verify' needs the package math-verify, which is not installed; pip install 'grpo-actors[math]'"
    )
    with pytest.raises(RewardError, match=re.escape(cure)):
        Scorer({"math_verify": 1.0}, timeout_s=5)


def test_a_misspelled_name_is_answered_with_its_name():
    with pytest.raises(RewardError, match="did you mean 'math_verify'"):
        Scorer({"math_verfy": 1.0}, timeout_s=5)
