"""The compatibility table of docs/howto/rewards.md: files written for TRL are used unchanged, and give the right values."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from grpo_actors.errors import RewardError
from grpo_actors.tasks.dataset import DataSet
from grpo_actors.tasks.scoring import Scorer, TrainerState
from grpo_actors.tasks.task import Problem

FILE = Path(__file__).with_name("trl_rewards.py")
FACTORIES = Path(__file__).with_name("trl_factories.py")
QUESTION = ({"role": "user", "content": "21 + 10 = ?"},)
CHAT = Problem("sum/1", QUESTION, "31", {"answer": "31", "solution": "$31$", "kind": "sum"})
TEXT = Problem("sum/1", QUESTION, "31", {"answer": "31", "kind": "sum"}, text_prompt=True)

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed (pip install --no-deps trl)"
)
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


def own(function):
    return f"{FILE}:{function}"


FUNCTIONS = [
    *(
        "bools",
        "numpy_array",
        "numpy_scalars",
        "generator",
        "sometimes_nan",
        "sometimes_none",
        "asynchronous",
    ),
    *("session", "bonus", "fails", "wrong_length", "texts", "infinite", "types", "prompt_length"),
    *("token_count", "only_tokens", "step", "in_other_processes", "columns_of_trl"),
    *("accuracy_reward", "format_reward", "tag_count_reward", "len_reward", "cosine_scaled_reward"),
    *("repetition_penalty_reward", "code_reward", "integer_answer", "equal_columns", "column_types"),
]


@pytest.fixture(scope="module")
def scorer():
    with Scorer(dict.fromkeys(map(own, FUNCTIONS), 1.0), timeout_s=60) as scorer:
        scorer._names = []  # a test names the functions that it wants
        yield scorer


@pytest.fixture
def values(scorer):
    """Return the values of one function for completions of a problem."""

    def score(function, problem, completions, ids=None):
        scorer._names = [own(function)]
        scores = scorer.score(problem, completions, ids)
        assert scores.failures == {}
        return scores.rewards[own(function)]

    return score


@pytest.mark.parametrize(
    ("function", "right"),
    [
        ("bools", [1.0, 0.0]),
        ("numpy_array", [2.0, 4.0]),
        ("numpy_scalars", [1.0, 0.5]),
        ("generator", [0.0, 1.0]),
        ("sometimes_nan", [1.0, None]),
        ("sometimes_none", [1.0, None]),
        ("asynchronous", [1.0, 1.0]),
        ("bonus", [0.5, 0.5]),
    ],
)
@pytest.mark.parametrize("problem", [CHAT, TEXT], ids=["chat", "text"])
def test_every_form_of_function_and_value_is_taken(values, function, right, problem):
    assert values(function, problem, ["15", "none"]) == right


def test_all_calls_of_an_async_object_share_one_event_loop(values):
    assert [values("session", CHAT, ["a"]) for _ in range(2)] == [[1.0], [1.0]]


def test_a_text_prompt_gives_texts_and_a_chat_gives_messages(values):
    assert values("types", TEXT, ["a", "b"]) == [1.0, 1.0]
    assert values("types", CHAT, ["a", "b"]) == [2.0, 2.0]


def test_token_ids_reach_the_function_as_lists(values):
    assert values("token_count", CHAT, ["a", "b"], [[5, 6, 7], (8, 9)]) == [-3.0, -2.0]
    assert values("only_tokens", CHAT, ["a", "b"], [[5, 6, 7], [8, 9]]) == [7.0, 9.0]


def test_a_function_gets_the_trainers_state_and_may_log(values, scorer):
    scorer.trainer_state = TrainerState(global_step=3, max_steps=500, epoch=20.0)
    assert values("step", CHAT, ["a"]) == [3 + 0.5 + 20]


def test_the_columns_that_trl_does_not_pass_do_not_come(values):
    problem = Problem("x", QUESTION, "1", {"question": "?", "prompt": "p", "completion": "c", "answer": "1"})
    assert values("columns_of_trl", problem, ["a"], [[1]]) == [1.0]


def test_functions_of_the_file_run_in_spawned_processes(values):
    assert values("in_other_processes", CHAT, ["a", "b"]) == [0.0, 10.0]


# A thought and a boxed answer in tags; an answer alone. Their lengths enter some rewards.
WHOLE = "<think>\n21+10\n</think>\n<answer>\n\\boxed{31}\n</answer>"
SHORT = "\\boxed{30}"


def cosine(low, high, length):
    return low + 0.5 * (high - low) * (1 + math.cos(length / 100 * math.pi))


@pytest.mark.parametrize(
    ("function", "right"),
    [
        ("accuracy_reward", [1.0, 0.0]),
        ("format_reward", [1.0, 0.0]),
        ("tag_count_reward", [1.0, 0.0]),
        # The longest gets 0.5 − 1; the shortest would get 0.5, but it is wrong.
        ("len_reward", [-0.5, 0.0]),
        ("cosine_scaled_reward", [cosine(0.5, 1.0, len(WHOLE)), cosine(-0.5, -1.0, len(SHORT))]),
        ("repetition_penalty_reward", [0.0, 0.0]),
    ],
)
def test_the_rewards_of_open_r1(values, function, right):
    assert values(function, CHAT, [WHOLE, SHORT]) == pytest.approx(right)


def test_the_repetition_penalty_of_open_r1(values):
    # Four pairs of words, two of them different.
    assert values("repetition_penalty_reward", CHAT, ["a b a b a"]) == [-0.5]


def test_the_accuracy_of_open_r1_does_not_apply_without_a_solution(values):
    problem = Problem("x", QUESTION, "-", {"solution": "a proof"})
    assert values("accuracy_reward", problem, [WHOLE, SHORT]) == [None, None]


def test_the_code_reward_of_open_r1(values):
    cases = {"test_cases": [{"input": "2", "output": "4"}, {"input": "3", "output": "7"}]}
    program = "```python\nprint(int(input()) * 2)\n```"
    for info in (cases, json.dumps(cases)):
        problem = Problem("x", QUESTION, "-", {"verification_info": info})
        assert values("code_reward", problem, [program, "none"]) == [0.5, 0.0]


def from_file(tmp_path, row, **columns):
    """Return a problem of a file whose rows are like `row`."""
    path = tmp_path / "data.jsonl"
    other = row | {columns.get("prompt_column", "question"): "1 + 1 = ?"}
    path.write_text("".join(json.dumps(each) + "\n" for each in (row, other)))
    task = DataSet(str(path), **columns)
    [problem] = [p for p in (*task.problems("train"), *task.problems("eval")) if p.id == "data/1"]
    return problem


def test_the_answer_column_arrives_under_its_own_name_and_as_answer(values, tmp_path):
    row = {"prompt": "21 + 10 = ?", "solution": "$31$", "kind": "sum"}
    problem = from_file(tmp_path, row, prompt_column="prompt", answer_column="solution")
    assert values("equal_columns", problem, ["a"]) == [2.0]
    # Another column of that name keeps it: TRL knows no answer column.
    problem = from_file(tmp_path, row | {"answer": "x"}, prompt_column="prompt", answer_column="solution")
    assert values("equal_columns", problem, ["a"]) == [1.0]


def test_an_integer_answer_arrives_as_an_integer(values, tmp_path):
    problem = from_file(tmp_path, {"question": "21 + 10 = ?", "answer": 31})
    assert values("integer_answer", problem, ["<answer>31</answer>", "<answer>32</answer>"]) == [1.0, 0.0]


def test_a_text_in_the_file_is_a_text_prompt_and_a_chat_is_none(values, tmp_path):
    text = from_file(tmp_path, {"question": "21 + 10 = ?", "answer": 31})
    assert values("prompt_length", text, ["a"]) == [11.0]
    chat = from_file(tmp_path, {"question": list(QUESTION), "answer": 31})
    assert values("prompt_length", chat, ["a"]) == [-11.0]
    # A completion with turns of an environment is a chat, whatever the prompt was.
    assert not from_file(
        tmp_path, {"question": "21 + 10 = ?", "answer": 31}, environment="calculator"
    ).text_prompt


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        ("fails", r"raised KeyError: 'label' \(.*trl_rewards.py:\d+\)"),
        ("wrong_length", "must return one value for each of the 2 completions, got 1"),
        ("texts", r"value 0 must be a number, True, False or None, got str \('1.0'\)"),
        ("infinite", "value 1 must be finite in float32, got inf"),
    ],
)
def test_what_trl_would_not_train_on_is_an_error_of_that_function(scorer, function, rule):
    scorer._names = [own(function), own("bonus")]
    scores = scorer.score(CHAT, ["a", "b"])
    assert scores.rewards == {own(function): [None, None], own("bonus"): [0.5, 0.5]}
    [(name, failure)] = scores.failures.items()
    assert name == own(function)
    assert re.search(rule, failure.splitlines()[0])


SOLUTIONS = {"solution": "$31$"}
TRL = [
    ("trl.rewards:accuracy_reward", SOLUTIONS, [WHOLE, SHORT], None, [1.0, 0.0]),
    ("trl.rewards:accuracy_reward", {"solution": "a proof"}, [WHOLE, SHORT], None, [None, None]),
    (
        "trl.rewards:reasoning_accuracy_reward",
        SOLUTIONS,
        ["<think>\\boxed{30}</think>\\boxed{31}", "<think>\\boxed{31}"],
        None,
        [1.0, 0.0],
    ),
    ("trl.rewards:think_format_reward", {}, ["<think>a</think>b", "<think>a"], None, [1.0, 0.0]),
    # Half of max_len: cos(π / 2) = 0.
    (f"{FACTORIES}:cosine", SOLUTIONS, [WHOLE, SHORT], [[1] * 50] * 2, [0.75, -0.75]),
    # Three different pairs of three; one of four.
    (f"{FACTORIES}:repetition", {}, ["", ""], [[1, 2, 3, 4], [5] * 5], [0.0, -0.75]),
    # 10 of the last 20 tokens; beyond the limit.
    (f"{FACTORIES}:overlong", {}, ["", ""], [[1] * 90, [1] * 101], [-0.5, -1.0]),
]


@needs_trl
@needs_math_verify
@pytest.mark.parametrize("case", TRL, ids=lambda case: case[0].partition(":")[2])
def test_the_functions_of_trl_itself(trl_scorer, case):
    name, columns, completions, ids, right = case
    trl_scorer._names = [name]
    scores = trl_scorer.score(Problem("x", QUESTION, "31", columns), completions, ids)
    assert scores.failures == {}
    assert scores.rewards[name] == pytest.approx(right)


@pytest.fixture(scope="module")
def trl_scorer():
    with Scorer({name: 1.0 for name, *_ in TRL}, timeout_s=60) as scorer:
        yield scorer


def test_a_function_may_have_arguments_bound_to_it():
    name = own("tenth")
    with Scorer({name: 1.0}, timeout_s=60) as scorer:
        assert scorer.score(CHAT, ["abc"]).rewards[name] == pytest.approx([0.3])


def test_a_column_that_no_problem_has_is_found_with_the_list_of_columns(tmp_path):
    rows = [{"question": f"{n} + 1 = ?", "solution": "x", "answer": n + 1} for n in range(9)]
    rows[-1]["kind"] = "sum"

    def written(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    # One row with the column is enough.
    whole = written("whole.jsonl", rows)
    lacking = written("lacking.jsonl", [{"question": f"{n} + 2 = ?", "answer": n + 2} for n in range(9)])
    with Scorer({own("equal_columns"): 1.0, own("bonus"): 1.0}, timeout_s=60) as scorer:
        for task, where in ((DataSet(lacking), "training"), (DataSet(whole, lacking), "evaluation")):
            with pytest.raises(RewardError) as caught:
                scorer.check_columns(task)
            assert str(caught.value) == (
                f"reward.functions: {own('equal_columns')!r} needs the columns 'solution', 'kind'; "
                f"the {where} data has answer, question; add it, or give the argument a default"
            )
