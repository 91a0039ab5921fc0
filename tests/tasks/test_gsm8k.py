import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.errors import DataError
from grpo_actors.tasks.gsm8k import Gsm8k
from grpo_actors.tasks.scoring import Scorer

ROWS = [
    {"question": f"{n}+1?", "answer": f"{n}+1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1:,}"} for n in (1, 1000)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_gives_training_problems_and_the_test_split_to_evaluate_on(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:1])
    task = Gsm8k(str(tmp_path))
    assert [problem.id for problem in task.problems("train")] == ["gsm8k/train/0", "gsm8k/train/1"]
    assert [problem.id for problem in task.problems("eval")] == ["gsm8k/test/0"]
    assert task.describe_splits() == "33% of the problems (1) are held out for evaluation, 2 are to train on"
    assert task.notes == ["1 training prompts are also held out for evaluation: its scores are too high"]
    problem = task.problems("train")[1]
    assert problem.answer == "1,001"
    assert [message["role"] for message in problem.messages] == ["system", "user"]
    assert problem.messages[1]["content"] == "1000+1?"
    assert problem.columns["solution"].startswith("1000+1 = ")


def test_the_system_prompt_shows_the_format_that_the_rewards_want(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    task = Gsm8k(str(tmp_path))
    problem = task.problems("train")[0]
    request = problem.messages[0]["content"]
    example = request[request.index("<reasoning>") :].replace("the answer", "2")
    with Scorer(task.default_rewards, timeout_s=HANG_S) as scorer:
        assert scorer.score(problem, [example]).rewards == {name: [1.0] for name in task.default_rewards}
    assert task.is_correct(example, problem)
    assert not task.is_correct("2", problem)


def test_files_may_be_named_one_by_one(tmp_path):
    train, test = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:1])
    task = Gsm8k(str(train), str(test))
    assert (len(task.problems("train")), len(task.problems("eval"))) == (2, 1)


def test_a_file_of_training_problems_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"also set data.eval_path"):
        Gsm8k(str(write(tmp_path / "a.jsonl", ROWS)))


def test_a_file_to_evaluate_on_goes_with_one_to_train_on():
    with pytest.raises(DataError, match=r"data\.eval_path: may not be set without data\.path, got here"):
        Gsm8k(eval_path="here")


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read: No such file"):
        Gsm8k(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"prompt": "1+1?", "answer": "#### 2"}, r"train.jsonl:3: must have the texts question and answer"),
        ({"question": "1+1?", "answer": 2}, r"train.jsonl:3: must have the texts"),
        ({"question": "1+1?", "answer": "2"}, r"train.jsonl:3: answer must end in ####"),
        ({"question": "1+1?", "answer": "2 ####"}, r"train.jsonl:3: answer must end in ####"),
    ],
)
def test_a_row_that_is_not_gsm8ks_is_named(tmp_path, row, rule):
    write(tmp_path / "train.jsonl", [*ROWS, row])
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=rule):
        Gsm8k(str(tmp_path))


def test_an_empty_file_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", [])
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match="train split must have a problem"):
        Gsm8k(str(tmp_path))


def test_a_hub_out_of_reach_is_one_line_with_the_cure(tmp_path):
    script = "from grpo_actors.tasks.gsm8k import Gsm8k\ntry: Gsm8k()\nexcept Exception as error: print(repr(error))"
    output = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.startswith(("DataError('openai/gsm8k could not", 'DataError("openai/gsm8k could not'))
    assert "set data.path to a folder" in output
    assert len(output.splitlines()) == 1


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR names no folder with GSM8K")
def test_the_real_data_set_has_no_problem_in_both_splits():
    task = Gsm8k(os.environ["GSM8K_DIR"])
    train, held_out = (
        {p.messages[-1]["content"] for p in task.problems(split)} for split in ("train", "eval")
    )
    assert (len(train), len(held_out), train & held_out) == (7473, 1319, set())
    ids = [problem.id for split in ("train", "eval") for problem in task.problems(split)]
    assert len(set(ids)) == 7473 + 1319
