"""What a call of the API refuses, in one line, before anything starts."""

import datetime as dt
import functools
import re

import datasets
import mlx.core as mx
import numpy as np
import pytest
from bounds import HANG_S

from grpo_actors.api import evaluate, generate, load, train
from grpo_actors.api.arguments import Served, write_rows
from grpo_actors.errors import ConfigError, DataError, RewardError
from grpo_actors.tasks.rows import Location, read
from grpo_actors.tasks.scoring import Scorer


def brevity(completions, **columns):
    return [-len(text) for text in completions]


def score(text):
    return 1.0


class Judge:
    def __call__(self, completions):
        return [0.0] * len(completions)

    def method(self, completions):
        return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"learning_rat": 1e-5},
            "argument: learning_rat is not a setting; did you mean learning_rate?",
        ),
        (
            {"learning_rate": "fast"},
            'argument: learner.learning_rate must be a finite number ≥ 0, got "fast"',
        ),
        (
            {"model": "tiny", "model_name": "tiny"},
            "argument: model and model_name are one setting, given twice; keep one of them",
        ),
        (
            {"rewards": [3]},
            "rewards: must be names or functions, got int; for weights write {reward: weight}",
        ),
        (
            {"rewards": ["correctness", "correctness"]},
            "rewards: must be different ones, got correctness twice; give it a weight instead",
        ),
        (
            {"model": 3},
            "argument: model.model_name must be text in quotes, not empty, got 3",
        ),
        (
            {"data": {"train": [{"question": "1?"}]}},
            "data: must be a path, a hub id, a list of dicts or one datasets.Dataset, such as data['train'], got dict",
        ),
        *(
            (
                {"data": data},
                f"data: must be a path, a hub id, a list of dicts or one datasets.Dataset, got {kind}",
            )
            for data, kind in ((3, "int"), ({}, "dict"))
        ),
        ({"config": "quikstart"}, "quikstart: no such file; did you mean quickstart.toml?"),
    ],
)
def test_settings_are_refused_as_on_the_command_line(arguments, line, tmp_path):
    with pytest.raises(ConfigError) as error:
        train(**{"task": "arithmetic", "output_dir": str(tmp_path / "run"), **arguments})
    assert str(error.value).startswith(line)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_notes_on_the_settings_are_printed_as_on_the_command_line(tmp_path, capsys):
    (tmp_path / "flat.toml").write_text("seed = 3")
    with pytest.raises(DataError):  # before a run starts
        train(config=tmp_path / "flat.toml", data=["no row"], output_dir=str(tmp_path / "run"))
    assert re.search(r"^note: .*flat\.toml: flat keys of MLX-GRPO", capsys.readouterr().err, re.MULTILINE)


def test_a_function_that_is_no_reward_is_refused():
    with pytest.raises(
        RewardError, match=r"^rewards: score must take the argument completions or completion_ids"
    ):
        train(rewards=[brevity, score], task="arithmetic")


def test_functions_are_named_by_what_they_are_and_never_twice():
    served = Served()
    judge = Judge()
    weights = served.weights_of(
        {
            "correctness": 2,
            brevity: 0.5,
            judge: 1.0,
            judge.method: 1.0,
            functools.partial(brevity, sign=1): 1.0,
            functools.partial(functools.partial(brevity, sign=1), scale=2): 1.0,
            (lambda completions: [1.0] * len(completions)): 1.0,
        }
    )
    names = [
        "correctness",
        *(f"caller:{name}" for name in ("brevity", "Judge", "method", "brevity_2", "brevity_3", "lambda")),
    ]
    assert list(weights) == names
    assert list(weights.values()) == [2, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert served.weights_of(brevity) == {"caller:brevity": 1.0}  # the same function has the same name
    assert served.weights_of([brevity, "correctness"]) == {"caller:brevity": 1.0, "correctness": 1.0}


def test_rows_are_written_with_the_values_that_json_has(tmp_path):
    rows = datasets.Dataset.from_list(
        [
            {"question": "1 + 1?", "answer": 2, "when": dt.date(2026, 1, 1)},
            {"question": "ä?", "answer": 3},
        ]
    )
    folder = tmp_path / "new" / "run"
    file = write_rows(rows, folder, "data")
    expected = [(1, {"question": "1 + 1?", "answer": 2}), (2, {"question": "ä?", "answer": 3})]
    assert list(read(Location(str(file)))) == expected
    assert write_rows([row for _, row in expected], folder, "data") == file
    assert list(folder.iterdir()) == [file]
    other = write_rows([expected[0][1]], folder, "data")
    assert sorted(folder.iterdir()) == sorted([file, other]), "other rows have another file"


def test_rows_leave_a_file_of_the_users_own_in_the_run_folder_as_it_is(tmp_path):
    own = tmp_path / "data.jsonl"
    own.write_text("mine")
    file = write_rows([{"question": "1 + 1?"}], tmp_path, "data")
    assert own.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == sorted([file, own])


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (["What?"], "data, row 1: must have named columns, got"),
        ([{"question": {1, 2}}], "data, row 1, column question: must have a type of JSON, got set"),
    ],
)
def test_rows_that_cannot_be_kept_are_refused_and_leave_no_file(rows, line, tmp_path):
    with pytest.raises(DataError, match=f"^{line}"):
        write_rows(rows, tmp_path, "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"temprature": 1}, r"argument: temprature is no option; did you mean temperature\?"),
        ({"temperature": -1}, "--temperature must be ≥ 0"),
        ({"max_tokens": "5"}, "argument: max_tokens must be a whole number, got '5'"),
        ({"max_tokens": 2.5}, r"argument: max_tokens must be a whole number, got 2\.5"),
        ({"raw": 1}, "argument: raw must be True or False, got 1"),
        ({"max_tokens": True}, "argument: max_tokens must be a whole number, got True"),
    ],
)
def test_options_of_sampling_are_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        generate("tiny", "What is 2 + 3?", **options)


def test_settings_of_an_evaluation_are_refused():
    with pytest.raises(ConfigError, match=r"argument: tsk is not a setting; did you mean task\?"):
        evaluate("tiny", tsk="arithmetic")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"rewards": "correctness", "functions": {"soft_format": 1.0}}, "rewards and functions"),
        ({"samples": 4, "eval_subset_size": 8}, "samples and eval_subset_size"),
        ({"task": "gsm8k", "data.task": "arithmetic"}, "task and data.task"),
    ],
)
def test_a_setting_of_an_evaluation_is_given_once(arguments, names):
    with pytest.raises(ConfigError, match=f"^argument: {names} are one setting, given twice"):
        evaluate("tiny", **arguments)


def test_an_evaluation_calls_an_environment_of_the_program():
    seen = []

    def nod(messages, answer):
        seen.append(messages[-1]["role"])

    result = evaluate("tiny", task="arithmetic", environment=nod, max_turns=2, samples=2, max_new_tokens=48)
    assert result.problems == 2
    assert seen == ["assistant"] * 2


def test_a_loaded_model_is_a_module_with_its_tokenizer_and_answers_like_its_name():
    model = load("tiny")
    assert (repr(model), model.system) == ("<Model tiny>", "")
    assert load("tiny", system="Be brief.").system == "Be brief."
    ids = model.tokenizer.encode("1 + 1")
    assert model.module(mx.array([ids])).shape[:2] == (1, len(ids))
    numpys = {"max_tokens": np.int64(8), "temperature": np.float32(0)}
    assert generate(model, "1 + 1", **numpys) == generate("tiny", "1 + 1", max_tokens=8, temperature=0)


def test_of_no_prompts_there_are_no_answers():
    assert generate("tiny", []) == []


def test_a_prompt_that_is_none_is_refused():
    with pytest.raises(DataError, match="prompt 1: must be a text, or a chat that ends with the user, got 3"):
        generate("tiny", ["What is 2 + 3?", 3])
    turns = [{"role": "user", "content": "1 + 1"}]
    with pytest.raises(DataError, match="prompt 0: must be a text, or a chat that ends with the user, got "):
        generate("tiny", [*turns, {"role": "assistant", "content": "2"}])
    with pytest.raises(DataError, match="prompt 0: must be a text, got "):
        generate("tiny", turns, raw=True)
    with pytest.raises(DataError, match="prompt 1: prompt and answer may have 40 tokens, got "):
        generate("tiny", ["1 + 1", "1 + 1 " * 50], max_tokens=8, max_context=40)
    with pytest.raises(DataError, match="prompt: must be a text, a chat, or a list of them, got 3"):
        generate("tiny", 3)


def test_a_script_that_a_run_imports_for_a_reward_does_not_start_the_next_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from grpo_actors.api import train\n\n"
        "def brevity(completions, **columns):\n    return [0.0] * len(completions)\n\n"
        f"train(task='arithmetic', rewards=[{str(script)!r} + ':brevity'], output_dir={str(tmp_path / 'run')!r})\n"
    )
    with pytest.raises(
        RewardError, match=r"train\(\) was called while a run imports this file.* if __name__ == "
    ):
        Scorer({f"{script}:brevity": 1.0}, timeout_s=HANG_S)
    assert not (tmp_path / "run").exists()
