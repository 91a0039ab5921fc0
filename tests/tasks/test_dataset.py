import json
import random

import pytest

from grpo_actors.errors import DataError
from grpo_actors.tasks.dataset import DataSet
from grpo_actors.tasks.lines import MAX_LINE_BYTES, read_rows
from grpo_actors.tasks.rewards import correctness

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


def test_columns_are_mapped_and_the_others_reach_the_rewards(file):
    data = [{"ask": f"{n}+1?", "say": n + 1, "level": n, "tags": ["sum"]} for n in range(2)]
    path = file(data)
    problem = min(every(DataSet(path, prompt_column="ask", answer_column="say")), key=lambda p: p.id)
    assert problem.id == "data/1"
    assert problem.messages[-1] == {"role": "user", "content": "0+1?"}
    assert problem.answer == "1"
    # The answer also has its usual name.
    assert problem.columns == {"ask": "0+1?", "say": 1, "answer": 1, "level": 0, "tags": ["sum"]}
    assert problem.text_prompt


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" 4 ", "4"),
        (4, "4"),
        (4.5, "4.5"),
        (1e22, "1" + "0" * 22),
        (1e-7, "0.0000001"),
        (True, "true"),
        ([1, "a"], '[1, "a"]'),
        ({"x": 1}, '{"x": 1}'),
        (None, ""),
    ],
)
def test_an_answer_of_any_type_keeps_it_for_own_rewards_and_is_text_for_the_others(file, value, text):
    task = DataSet(file([{"question": "a", "answer": value}, {"question": "b", "answer": value}]))
    assert [problem.answer for problem in every(task)] == [text, text]
    assert [problem.columns["answer"] for problem in every(task)] == [value, value]


def test_answers_of_several_types_may_stand_in_one_column_and_some_may_be_missing(file):
    data = [{"question": f"{n}?", "answer": value} for n, value in enumerate((1, "x", [1, 2], None, 1.5))]
    task = DataSet(file([*data, {"question": "none?"}]))
    answers = {problem.id: problem.columns["answer"] for problem in every(task)}
    assert [answers[f"data/{n}"] for n in range(1, 7)] == [1, "x", [1, 2], None, 1.5, None]
    assert [type(answers[f"data/{n}"]) for n in (1, 5)] == [int, float]


def test_without_true_answers_no_accuracy_and_no_correctness_is_made_up(file):
    task = DataSet(file([{"question": "a"}, {"question": "b"}]))
    assert [problem.answer for problem in every(task)] == ["", ""]
    (values,) = [correctness([], [[{"role": "assistant", "content": "<answer>1</answer>"}]], [""])]
    assert values == [None]


def test_duplicates_are_counted_in_a_note(file):
    path = file([*rows(4), *rows(2), {"question": "0+1?", "answer": 7}])
    assert DataSet(path).notes == [f"{path}: 2 problems repeat an earlier one, as data/5 repeats data/1"]


@pytest.mark.parametrize(
    ("chat", "read"),
    [
        # As makers of data sets leave them: keys without a value, keys of their own, parts, roles of tools.
        (
            [{"role": "user", "content": "1+1?", "name": None, "tool_calls": None, "id": 3}],
            [{"role": "user", "content": "1+1?"}],
        ),
        (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
        ),
        (
            [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": None},
                {"role": "tool", "content": "2"},
            ],
            [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": ""},
                {"role": "tool", "content": "2"},
            ],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}],
            [{"role": "user", "content": "1+1?"}],
        ),
        (
            [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<reasoning>"}],
            [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<reasoning>"}],
        ),
    ],
    ids=["nulls and other keys", "developer", "tool", "parts", "prefill"],
)
def test_chats_are_read_as_their_makers_leave_them(file, chat, read):
    other = [{"role": "user", "content": "other"}]
    task = DataSet(file([{"question": chat, "answer": 2}, {"question": other, "answer": 3}]))
    assert tuple(read) in [problem.messages for problem in every(task)]
    assert not any(problem.text_prompt for problem in every(task))


def test_a_chat_is_taken_as_it_is(file):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2+2?"},
    ]
    task = DataSet(file([{"question": chat, "answer": 4}, {"question": chat[1:2], "answer": 2}]))
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
    assert sorted(problem.answer for problem in every(DataSet(file(content)))) == ["2", "4"]


def test_a_line_of_ten_megabytes_is_a_problem_like_any_other(file):
    task = DataSet(file([{"question": "x" * 10_000_000, "answer": 1}, {"question": "y", "answer": 2}]))
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
        (b'{"question": "a", "answer": 1e999}', r"data.jsonl:3: .*1e999 is beyond a float"),
        (b'{"question": "\xff", "answer": 1}', r"data.jsonl:3: must be UTF-8, got byte 0xff at position 14"),
        (
            b'{"question": "a \\ud83d b", "answer": 1}',
            r"data.jsonl, row 3, column question: must be text, got the lone surrogate U\+D83D at character 3 of",
        ),
        (b'{"question": "", "answer": 1}', r"data.jsonl, row 3, column question: must be a text, not empty,"),
        (
            b'{"question": "  ", "answer": 1}',
            r"data.jsonl, row 3, column question: must be a text, not empty,",
        ),
        (b'{"prompt": "a", "answer": 1}', r"row 3, column question: must be a text, .* got None"),
    ],
)
def test_a_bad_line_is_named_with_the_rule_in_one_line(file, line, rule):
    with pytest.raises(DataError, match=rule) as caught:
        DataSet(file(TWO + line + b"\n"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("chat", "rule"),
    [
        ([{"role": "user"}], "whose content is a text or a list of parts"),
        ([{"role": "user", "content": " "}], "must not end with an empty turn of user"),
        ([{"role": "assistant", "content": "a"}], "must have a turn of the user"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "must end with the user"),
        ([{"role": "root", "content": "a"}], "must have turns of system, developer, .*, not of 'root'"),
        ([{"content": "a"}], "must be a chat of turns with role and content"),
        (
            [{"role": "user", "content": [{"type": "image", "text": None}]}],
            "parts of text only, not of 'image'",
        ),
        ([], "must be a text, not empty, or a chat"),
    ],
)
def test_a_chat_that_cannot_be_trained_on_is_named_with_row_column_and_reason(file, chat, rule):
    with pytest.raises(DataError, match=rf"data.jsonl, row 1, column question: .*{rule}"):
        DataSet(file([{"question": chat, "answer": 1}]))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(file, content):
    with pytest.raises(DataError, match=r"data.jsonl: must have a row, got none; check data.path"):
        DataSet(file(content))


def test_what_is_nowhere_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: no such file, folder or hub id; check data.path"):
        DataSet(str(tmp_path / "none.jsonl"))
    (tmp_path / "data.txt").write_text("a\n")
    with pytest.raises(
        DataError, match=r"data.txt: must be a file of type json, jsonl, ndjson, csv, tsv, parq"
    ):
        DataSet(str(tmp_path / "data.txt"))


def test_a_column_that_the_settings_name_must_be_there(file):
    path = file([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}])
    with pytest.raises(
        DataError, match=r"row 1: must have the column 'question', got .*set data.prompt_column"
    ):
        DataSet(path)
    with pytest.raises(
        DataError, match=r"row 1: must have the column 'solution', got .*set data.answer_column"
    ):
        DataSet(path, prompt_column="prompt", answer_column="solution")


def test_no_path_is_refused():
    with pytest.raises(DataError, match=r"data.path"):
        DataSet("")


def test_ids_of_the_rows_are_kept_and_may_not_repeat(file):
    data = [{"id": name, **row} for name, row in zip("aba", rows(3), strict=True)]
    assert {problem.id for problem in every(DataSet(file(data[:2])))} == {"data/a", "data/b"}
    with pytest.raises(DataError, match=r"data.jsonl, row 3: id must be unique, got 'a', which row 1 has"):
        DataSet(file(data))


def test_about_the_fraction_is_held_out_and_nothing_is_on_both_sides(file):
    task = DataSet(file(rows(2000)), eval_fraction=0.1)
    train, held_out = (
        {problem.messages[-1]["content"] for problem in task.problems(split)} for split in ("train", "eval")
    )
    # 200 of 2,000 expected; the standard deviation of such a draw is √(2000 · 0.1 · 0.9) = 13.4.
    assert abs(len(held_out) - 200) < 5 * 13.4
    assert len(train) + len(held_out) == 2000


def test_held_out_problems_stay_held_out_when_the_file_is_reordered_or_grows(file):
    before = {problem.answer for problem in DataSet(file(rows(200))).problems("eval")}
    longer = rows(400)
    random.Random(1).shuffle(longer)
    after = DataSet(file(longer))
    assert before <= {problem.answer for problem in after.problems("eval")}


def test_a_prompt_that_occurs_twice_is_on_one_side(file):
    task = DataSet(file([*rows(50), *({**row, "answer": 0} for row in rows(50))]), eval_fraction=0.5)
    train, held_out = (
        {problem.messages[-1]["content"] for problem in task.problems(s)} for s in ("train", "eval")
    )
    assert len(train) + len(held_out) == 50
    assert len(every(task)) == 100


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_has_a_problem_however_small_the_file(file, fraction):
    task = DataSet(file(rows(2)), eval_fraction=fraction)
    assert (len(task.problems("train")), len(task.problems("eval"))) == (1, 1)


def test_one_prompt_cannot_be_split(file):
    with pytest.raises(DataError, match="two different prompts"):
        DataSet(file(rows(1) * 3))


def test_a_prompt_of_the_evaluation_file_is_not_trained_on(file):
    task = DataSet(file(rows(5)), file(rows(2), "held_out.jsonl"))
    assert [problem.id for problem in task.problems("train")] == ["data/3", "data/4", "data/5"]
    assert [problem.id for problem in task.problems("eval")] == ["data/eval/1", "data/eval/2"]
    (note,) = task.notes
    assert ": 2 prompts are also in " in note


def test_another_split_of_the_data_may_be_held_out(file):
    source = file(
        f"def load():\n    return {{'train': {rows(5)}, 'test': {rows(2)}}}\n".encode(), "my_data.py"
    )
    task = DataSet(f"{source}:load", eval_split="test")
    assert [problem.id for problem in task.problems("train")] == ["data/3", "data/4", "data/5"]
    assert [problem.id for problem in task.problems("eval")] == ["data/eval/1", "data/eval/2"]
    (note,) = task.notes
    assert note.endswith(f"load: 2 prompts are also in {source}:load test and are not trained on")


def test_equal_files_cannot_be_used_to_train_and_to_evaluate(file):
    with pytest.raises(DataError, match=r"must have a prompt that .* has not"):
        DataSet(file(rows(3)), file(rows(3), "same.jsonl"))
