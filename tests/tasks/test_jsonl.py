import json
import random

import pytest

from grpo_actors.errors import DataError
from grpo_actors.tasks.jsonl import Jsonl
from grpo_actors.tasks.lines import MAX_LINE_BYTES, read_rows

TWO = b'{"question": "1+1?", "answer": 2}\n{"question": "2+2?", "answer": 4}\n'


@pytest.fixture
def file(tmp_path):
    def write(content, name="data.jsonl"):
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        return str(path)

    return write


def every(task):
    return [problem for split in ("train", "eval") for problem in task.problems(split)]


def rows(count):
    return [{"question": f"{n}+1?", "answer": n + 1} for n in range(count)]


def test_columns_are_mapped_and_all_reach_the_rewards(file):
    data = [{"ask": f"{n}+1?", "say": n + 1, "level": n, "tags": ["sum"]} for n in range(2)]
    path = file(data)
    problem = min(every(Jsonl(path, prompt_column="ask", answer_column="say")), key=lambda p: p.id)
    assert problem.id == "jsonl/1"
    assert problem.messages[-1] == {"role": "user", "content": "0+1?"}
    assert problem.answer == "1"
    assert problem.columns == {"ask": "0+1?", "say": 1, "answer": 1, "level": 0, "tags": ["sum"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(" 4 ", "4"), (4, "4"), (4.5, "4.5"), (1e22, "1" + "0" * 22), (1e-7, "0.0000001"), (True, "true")],
)
def test_any_scalar_answer_becomes_the_text_that_a_model_would_write(file, value, text):
    task = Jsonl(file([{"question": "a", "answer": value}, {"question": "b", "answer": value}]))
    assert {problem.answer for problem in every(task)} == {text}
    assert all(task.is_correct(f"<answer>{text}</answer>", problem) for problem in every(task))


def test_a_chat_is_taken_as_it_is(file):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2+2?"},
    ]
    task = Jsonl(file([{"question": chat, "answer": 4}, {"question": chat[1:2], "answer": 2}]))
    assert sorted(len(problem.messages) for problem in every(task)) == [1, 4]
    assert tuple(chat) in [problem.messages for problem in every(task)]


@pytest.mark.parametrize(
    "content",
    [
        TWO,
        TWO[:-1],
        TWO.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + TWO,
        b"\n" + TWO.replace(b"\n", b"\n \n\n"),
    ],
    ids=["plain", "no final newline", "Windows line ends", "byte-order mark", "blank lines"],
)
def test_files_with_any_line_ends_blank_lines_and_byte_order_marks_are_read(file, content):
    assert sorted(problem.answer for problem in every(Jsonl(file(content)))) == ["2", "4"]


def test_a_line_of_ten_megabytes_is_a_problem_like_any_other(file):
    task = Jsonl(file([{"question": "x" * 10_000_000, "answer": 1}, {"question": "y", "answer": 2}]))
    assert max(len(problem.messages[-1]["content"]) for problem in every(task)) == 10_000_000


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(tmp_path):
    path = tmp_path / "endless.jsonl"
    with path.open("wb") as sparse:
        sparse.truncate(50 * MAX_LINE_BYTES)
    with pytest.raises(DataError, match=r"endless.jsonl:1: a line may have"):
        next(read_rows(path))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"question": "1', r"data.jsonl:3: must be one JSON object \(Unterminated"),
        (b"[1, 2]", r"data.jsonl:3: must be a JSON object with named columns, got \[1, 2\]"),
        (b"[" * 100_000, r"data.jsonl:3: must be one JSON object"),
        (b'{"question": "a", "answer": NaN}', r"data.jsonl:3: must be one JSON object \(NaN is not JSON"),
        (b'{"question": "a", "answer": 1e999}', r"data.jsonl:3: .*1e999 is beyond a float"),
        (b'{"question": "\xff", "answer": 1}', r"data.jsonl:3: must be UTF-8, got byte 0xff at position 14"),
        (b'{"prompt": "a", "answer": 1}', r"data.jsonl:3: must have the column 'question', got .*'prompt'"),
        (b'{"question": "a"}', r"data.jsonl:3: must have the column 'answer'.*set data.answer_column"),
        (b'{"question": "", "answer": 1}', r"data.jsonl:3: question must be a text or a chat"),
        (b'{"question": 5, "answer": 1}', r"data.jsonl:3: question must be a text or a chat"),
        (b'{"question": [], "answer": 1}', r"data.jsonl:3: question must be"),
        (b'{"question": [{"role": "user"}], "answer": 1}', r"data.jsonl:3: question must be"),
        (b'{"question": [{"role": "assistant", "content": "a"}], "answer": 1}', r"ends with the user"),
        (b'{"question": [{"role": "root", "content": "a"}], "answer": 1}', r"data.jsonl:3: question must be"),
        (b'{"question": [{"role": ["x"], "content": "a"}], "answer": 1}', r"data.jsonl:3: question must be"),
        (b'{"question": "a", "answer": null}', r"data.jsonl:3: answer must be a text, a number"),
        (b'{"question": "a", "answer": [1]}', r"data.jsonl:3: answer must be a text, a number"),
        (b'{"question": "a", "answer": " "}', r"data.jsonl:3: answer must be a text, a number"),
    ],
)
def test_a_bad_line_is_named_with_the_rule_in_one_line(file, line, rule):
    with pytest.raises(DataError, match=rule) as caught:
        Jsonl(file(TWO + line + b"\n"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(file, content):
    with pytest.raises(DataError, match=r"data.jsonl: must have a problem, got an empty file"):
        Jsonl(file(content))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read: No such file or directory"):
        Jsonl(str(tmp_path / "none.jsonl"))


def test_no_path_is_refused():
    with pytest.raises(DataError, match=r"data.path"):
        Jsonl("")


def test_ids_of_the_rows_are_kept_and_may_not_repeat(file):
    data = [{"id": name, **row} for name, row in zip("aba", rows(3), strict=True)]
    assert {problem.id for problem in every(Jsonl(file(data[:2])))} == {"jsonl/a", "jsonl/b"}
    with pytest.raises(DataError, match=r"data.jsonl:3: id must be unique, got 'a', which line 1 has"):
        Jsonl(file(data))


def test_about_the_fraction_is_held_out_and_nothing_is_on_both_sides(file):
    task = Jsonl(file(rows(2000)), eval_fraction=0.1)
    train, held_out = (
        {problem.messages[-1]["content"] for problem in task.problems(split)} for split in ("train", "eval")
    )
    # 200 of 2,000 expected; the standard deviation of such a draw is √(2000 · 0.1 · 0.9) = 13.4.
    assert abs(len(held_out) - 200) < 5 * 13.4
    assert len(train) + len(held_out) == 2000


def test_held_out_problems_stay_held_out_when_the_file_is_reordered_or_grows(file):
    before = {problem.answer for problem in Jsonl(file(rows(200))).problems("eval")}
    longer = rows(400)
    random.Random(1).shuffle(longer)
    after = Jsonl(file(longer))
    assert before <= {problem.answer for problem in after.problems("eval")}


def test_a_prompt_that_occurs_twice_is_on_one_side(file):
    task = Jsonl(file([*rows(50), *({**row, "answer": 0} for row in rows(50))]), eval_fraction=0.5)
    train, held_out = (
        {problem.messages[-1]["content"] for problem in task.problems(s)} for s in ("train", "eval")
    )
    assert len(train) + len(held_out) == 50
    assert len(every(task)) == 100


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_has_a_problem_however_small_the_file(file, fraction):
    task = Jsonl(file(rows(2)), eval_fraction=fraction)
    assert (len(task.problems("train")), len(task.problems("eval"))) == (1, 1)


def test_one_prompt_cannot_be_split(file):
    with pytest.raises(DataError, match="two different prompts"):
        Jsonl(file(rows(1) * 3))


def test_a_prompt_of_the_evaluation_file_is_not_trained_on(file, caplog):
    task = Jsonl(file(rows(5)), file(rows(2), "held_out.jsonl"))
    assert [problem.id for problem in task.problems("train")] == ["jsonl/3", "jsonl/4", "jsonl/5"]
    assert [problem.id for problem in task.problems("eval")] == ["jsonl/eval/1", "jsonl/eval/2"]
    assert "2 prompts are also in" in caplog.text


def test_equal_files_cannot_be_used_to_train_and_to_evaluate(file):
    with pytest.raises(DataError, match=r"must have a prompt that .* has not"):
        Jsonl(file(rows(3)), file(rows(3), "same.jsonl"))
