import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.errors import DataError
from grpo_actors.tasks.reasoning_gym import ReasoningGym
from grpo_actors.tasks.scoring import Scorer

# Not imported here: it takes seconds, in every process that collects the tests.
if importlib.util.find_spec("reasoning_gym") is None:
    pytest.skip("needs reasoning-gym", allow_module_level=True)


def task(name="chain_sum", settings=None, *, seed=0, size=30, eval_size=10):
    return ReasoningGym(name, settings or {}, seed=seed, gym_size=size, gym_eval_size=eval_size)


def questions(one, split):
    return [problem.messages[-1]["content"] for problem in one.problems(split)]


# The library takes seconds to import, in each process that makes problems or scores answers.
@pytest.fixture(scope="module")
def sums() -> ReasoningGym:
    return task()


@pytest.fixture(scope="module")
def countdown() -> ReasoningGym:
    """Problems with many right answers, which the scorer evaluates as expressions."""
    return task("countdown", size=2, eval_size=1)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer({"reasoning_gym": 1.0}, timeout_s=HANG_S) as scorer:
        yield scorer


def test_another_seed_makes_other_problems_with_the_same_held_out(sums):
    other = task(seed=2)
    assert not set(questions(sums, "train")) & set(questions(other, "train"))
    assert sums.problems("eval") == other.problems("eval")


def test_equal_seeds_make_equal_problems_in_every_process_also_where_a_generator_follows_the_order_of_a_set():
    # Without a fixed PYTHONHASHSEED, it makes other problems in another process.
    script = (
        "from grpo_actors.tasks.reasoning_gym import ReasoningGym\n"
        "made = ReasoningGym('isomorphic_strings', {}, seed=0, gym_size=20, gym_eval_size=1).problems('train')\n"
        "print([problem.messages[-1]['content'] for problem in made])\n"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(made) == 1


def test_no_question_is_posed_twice_or_on_both_sides(caplog):
    # Sums of two numbers of one digit, 10 · 10 · 2 signs at most: 400 of them must repeat.
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    one = task(settings=settings, size=400, eval_size=20)
    both = questions(one, "train") + questions(one, "eval")
    assert 20 < len(both) <= 200
    assert len(set(both)) == len(both)
    train = len(questions(one, "train"))
    assert f"chain_sum: {400 - train} of 400 problems repeat others and are left out" in caplog.text


def test_problems_that_are_all_held_out_leave_none_to_train_on():
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match="must make a problem that is not held out, got none of 3"):
        task(settings=settings, size=3, eval_size=1_000)


def test_the_librarys_own_score_is_the_reward_and_all_of_it_is_right(sums, scorer):
    problem = sums.problems("train")[0]
    # Its rule for an answer with other text around it: the share of the text that is the answer.
    completions = [
        f"<answer>{problem.answer}</answer>",
        f"<answer>{problem.answer}{'.' * len(problem.answer)}</answer>",
        problem.answer,
        "<answer>\n</answer>",
    ]
    scores = scorer.score(problem, completions)
    assert scores.failures == {}
    assert scores.rewards == {"reasoning_gym": [1.0, 0.5, 0.0, 0.0]}
    assert [sums.is_correct(completion, problem) for completion in completions] == [True, False, False, False]


@pytest.mark.parametrize(
    "name",
    [
        "rearc",  # its scorer compares tuples, which JSON does not have
        pytest.param("countdown", marks=pytest.mark.slow),  # many right answers
        pytest.param("graph_color", marks=pytest.mark.slow),  # names no answer
    ],
)
def test_what_the_scorer_needs_travels_with_the_problem(name):
    one = task(name, size=2, eval_size=1)
    problem = one.problems("train")[0]
    assert not one.is_correct("<answer>nothing of the kind</answer>", problem)
    if problem.answer:
        assert one.is_correct(f"<answer>{problem.answer}</answer>", problem)


def test_an_answer_that_is_evaluated_forever_is_wrong_and_ends_nothing(countdown, scorer):
    problem = countdown.problems("train")[0]
    scorer.score(problem, ["<answer>1</answer>"])
    hostile = scorer.score(problem, ["<answer>factorial(factorial(12))</answer>", "<answer>1</answer>"])
    after = scorer.score(problem, [f"<answer>{problem.answer}</answer>"])
    assert hostile.rewards["reasoning_gym"][0] in (None, 0.0)
    assert after.rewards == {"reasoning_gym": [1.0]}


def test_an_answer_on_which_the_librarys_scorer_fails_is_worth_nothing_and_the_others_keep_their_values(
    scorer,
):
    problem = task("prime_factorization", size=1, eval_size=1).problems("train")[0]
    scores = scorer.score(problem, ["<answer>many</answer>", f"<answer>{problem.answer}</answer>"])
    assert scores.failures == {}
    assert scores.rewards == {"reasoning_gym": [0.0, 1.0]}


def test_several_tasks_are_mixed_by_the_librarys_own_composite():
    parts = [
        {"name": "chain_sum", "weight": 3, "config": {"max_terms": 2}},
        {"name": "leg_counting", "weight": 1, "config": {}},
    ]
    one = task("composite", {"datasets": parts}, size=20)
    sums = sum("arithmetic" in question for question in questions(one, "train"))
    assert 0 < sums < len(questions(one, "train"))
    assert all(one.is_correct(f"<answer>{p.answer}</answer>", p) for p in one.problems("train"))


@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        ("chain_sun", {}, "data.gym_task: reasoning-gym has no task 'chain_sun'; did you mean chain_sum"),
        ("zzz", {}, "has no task 'zzz'; there are ab, acre"),
        ("chain_sum", {"min_term": 2}, "'chain_sum' has no setting 'min_term'; did you mean min_terms"),
        ("chain_sum", {"min_terms": 0}, "data.gym_settings: 'chain_sum' refuses them: min_terms must be"),
        ("chain_sum", {"min_terms": "two"}, "data.gym_settings: 'chain_sum' refuses them: "),
        ("chain_sum", {"seed": 3}, "may not have 'seed'; set run.seed"),
        ("composite", {}, "'composite' refuses them: Must specify at least one dataset"),
        ("composite", {"datasets": [{"name": "zzz"}]}, "'composite' refuses them: "),
    ],
)
def test_what_the_library_refuses_is_one_line(name, settings, rule):
    from grpo_actors.tasks.gym_library import open_dataset

    with pytest.raises(DataError) as caught:
        open_dataset(name, settings, seed=0, size=1)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_there_is_one_line_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        DataError, match=r"needs the package reasoning-gym.*pip install 'grpo-actors\[reasoning\]'"
    ):
        task()
