"""Where the rows of a data set may be."""

import bz2
import gzip
import json
import lzma
import time

import pytest

from grpo_actors.errors import DataError
from grpo_actors.tasks.rows import Location, read

ROWS = [{"question": f"{n}+1?", "answer": n + 1} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows(path, **more):
    found = list(read(Location(str(path), **more)))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return [row for _, row in found]


def write(path):
    """Write ROWS in the format of the file's name."""
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_text(LINES)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(LINES.encode()))
        case ".jsonl.bz2":
            path.write_bytes(bz2.compress(LINES.encode()))
        case ".jsonl.xz":
            path.write_bytes(lzma.compress(LINES.encode()))
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".csv":
            made.to_csv(str(path))
        case ".csv.gz":
            table = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)
            path.write_bytes(gzip.compress(table.encode()))
        case ".tsv":
            made.to_csv(str(path), sep="\t")
        case ".parquet":
            made.to_parquet(str(path))
    return path


@pytest.mark.parametrize(
    "suffix",
    [".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".json", ".csv", ".csv.gz", ".tsv", ".parquet"],
)
def test_a_file_of_any_format_gives_the_same_rows_and_an_integer_stays_an_integer(tmp_path, suffix):
    found = rows(write(tmp_path / f"data{suffix}"))
    assert found == ROWS
    assert {type(row["answer"]) for row in found} == {int}


def test_integers_of_a_csv_stay_integers_beside_gaps(tmp_path):
    table = "question,whole,share,all,flag\na,1,0.5,7,True\nb,,,8,\nc,-9007199254740993,2,9,False\n"
    for path in (tmp_path / "one.csv", tmp_path / "folder" / "two.csv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(table)
    expected = [
        {"question": "a", "whole": 1, "share": 0.5, "all": 7, "flag": True},
        {"question": "b", "whole": None, "share": None, "all": 8, "flag": None},
        # A float has no place for its last digit. A column with fractions has floats.
        {"question": "c", "whole": -(2**53) - 1, "share": 2.0, "all": 9, "flag": False},
    ]
    for source in (tmp_path / "one.csv", tmp_path / "folder"):
        found = rows(source)
        assert found == expected
        assert [type(row["whole"]) for row in found] == [int, type(None), int]
        assert type(found[2]["share"]) is float


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"question,answer\na,1\n\xff,2\n"),
        ("a.json", b'[{"question": "a"},\n\n{"question": "\xff"}]'),
    ],
)
def test_a_line_that_is_not_utf_8_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}:3: must be UTF-8, got byte 0xff at position \d+; convert"):
        rows(tmp_path / name)


def test_a_glob_and_a_folder_give_the_rows_of_all_their_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name}) + "\n")
    assert [row["question"] for row in rows(tmp_path / "*.jsonl")] == ["a", "b"]
    assert sorted(row["question"] for row in rows(tmp_path)) == ["a", "b"]
    write(tmp_path / "c.parquet")
    with pytest.raises(DataError, match="files must be of one type, got json, parquet"):
        rows(tmp_path / "*")


def test_a_saved_data_set_is_read_by_its_split(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert rows(tmp_path / "one") == rows(tmp_path / "two") == ROWS
    assert rows(tmp_path / "two", split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"has the splits train, test, got data.split = 'dev'"):
        rows(tmp_path / "two", split="dev")


def test_a_function_of_the_user_gives_rows_or_splits(tmp_path):
    file = tmp_path / "my_data.py"
    file.write_text(
        "def load():\n    return ({'question': str(n), 'answer': n} for n in range(3))\n"
        "def splits():\n    return {'train': [{'question': 'a'}], 'test': [{'question': 'b'}]}\n"
        "def broken():\n    raise KeyError('no')\n"
        "def lone():\n    return [{'question': 'a'}, {'question': 'x\\ud83d'}]\n"
        "def other():\n    return [{'question': 'a', 'picture': b'x'}]\n"
    )
    assert rows(f"{file}:load") == [{"question": str(n), "answer": n} for n in range(3)]
    assert rows(f"{file}:splits", split="test") == [{"question": "b"}]
    for name, says in (
        ("broken", r"broken cannot be called \(KeyError: 'no'\)"),
        ("none", r"none cannot be called \(KeyError: 'none'\)"),
        (
            "lone",
            r"lone, row 2, column question: must be text, got the lone surrogate U\+D83D at character 2",
        ),
        ("other", r"other, row 1, column picture: must have a type of JSON, got bytes"),
    ):
        with pytest.raises(DataError, match=says):
            rows(f"{file}:{name}")


def test_columns_that_no_reward_can_get_are_left_out_and_a_number_that_is_none_is_null(tmp_path):
    from datasets import Dataset

    path = tmp_path / "data.parquet"
    made = {"question": ["a", "b"], "raw": [b"x", b"y"], "score": [float("nan"), 0.5], "tags": [["u"], None]}
    Dataset.from_dict(made).to_parquet(str(path))
    assert rows(path) == [
        {"question": "a", "score": None, "tags": ["u"]},
        {"question": "b", "score": 0.5, "tags": None},
    ]


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    # The hub's client tries six times, and waits 23 s in all in between.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"^someone/nothing-at-all: cannot be loaded \(") as caught:
        rows("someone/nothing-at-all")
    assert "\n" not in str(caught.value)
