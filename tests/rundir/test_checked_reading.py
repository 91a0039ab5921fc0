"""What is wrong with a file of a run folder is one line: the file, the place in it, and the cure."""

import pytest
from pydantic import TypeAdapter

from grpo_actors.errors import RunError
from grpo_actors.rundir.reading import read_json

FORM = TypeAdapter(dict[str, list[int]])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"a": [1, "x"], "b": 3}',
            "a.1: Input should be a valid integer, unable to parse string as an integer",
        ),
        ("[]", "Input should be an object"),
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
    ],
)
def test_a_file_of_another_form_is_named_with_the_place_and_the_cure(tmp_path, content, reason):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(RunError) as refused:
        read_json(file, FORM, "remove it")
    assert str(refused.value) == f"{file}: {reason}; remove it"


def test_a_file_is_read_or_named_with_what_the_system_says(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(RunError, match=r"x\.json: cannot be read \(No such file or directory\); remove it"):
        read_json(file, FORM, "remove it")
    file.write_text('{"a": [1, 2]}')
    assert read_json(file, FORM, "remove it") == {"a": [1, 2]}
