"""Files of lines: where a line ends, what it may hold, and the one line of an error that names it."""

import json

import pytest

from grpo_actors.errors import DataError
from grpo_actors.tasks import lines
from grpo_actors.tasks.lines import excerpt, read_lines, read_rows

MARK = b"\xef\xbb\xbf"


@pytest.fixture
def file(tmp_path):
    def write(content):
        (tmp_path / "rows.jsonl").write_bytes(content)
        return tmp_path / "rows.jsonl"

    return write


def test_lines_are_numbered_from_1_and_blank_ones_count(file):
    path = file(b'{"a": 1}\n\n  \n {"a": 2} \r\n')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_only_the_first_line_may_begin_with_a_byte_order_mark(file):
    path = file(MARK + b"a\n" + MARK + b"b\n")
    assert list(read_lines(path, setting="data.path")) == [(1, "a"), (2, "\ufeffb")]


def test_a_line_of_just_the_bound_is_read_and_a_longer_one_is_named(file, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 8)
    # Its end counts.
    assert list(read_lines(file(b"1234567\n12345678"), setting="data.path")) == [
        (1, "1234567"),
        (2, "12345678"),
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a line may have 8 bytes, got more"):
        list(read_lines(file(b"1\n12345678\n"), setting="data.path"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": 1e999}', "1e999 is beyond a float"),
        (b'{"a": -1e999}', "-1e999 is beyond a float"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b"[" * 100_000, "must be one JSON object"),
        (b"[1]", "must be a JSON object with named columns, got [1]; write "),
        (b'{"a": "\xe4"}', "must be UTF-8, got byte 0xe4 at position 7; convert the file"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_the_rule(file, line, says):
    with pytest.raises(DataError) as caught:
        list(read_rows(file(b'{"a": 0}\n' + line + b"\n")))
    assert "rows.jsonl:2: " in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_number_with_a_point_is_a_float(file):
    assert list(read_rows(file(json.dumps({"a": 1.5, "b": 2}).encode()))) == [(1, {"a": 1.5, "b": 2})]


def test_a_file_that_cannot_be_read_is_named_with_its_setting(tmp_path):
    with pytest.raises(
        DataError, match=r"none: cannot be read: No such file or directory; check data\.eval_path"
    ):
        list(read_lines(tmp_path / "none", setting="data.eval_path"))


def test_a_value_is_shown_whole_up_to_eighty_characters():
    # With its quotes.
    assert excerpt("x" * 78) == repr("x" * 78)
    assert excerpt("x" * 79) == f"'{'x' * 78}…"
    assert excerpt("x" * 1000) == f"'{'x' * 78}…"
    assert excerpt({"a": [1, 2]}) == "{'a': [1, 2]}"
