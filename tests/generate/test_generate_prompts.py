"""A file of prompts is read completely, or rejected with the line that is wrong."""

import pytest

from grpo_actors.errors import DataError
from grpo_actors.generate.prompts import read_requests

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture
def file(tmp_path):
    def write(content, name="in.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_prompts_and_chats_may_be_mixed_and_keep_their_ids(file):
    path = file(
        '{"prompt": "hi", "id": "a", "answer": 3}\n\n'
        '{"messages": [{"role": "user", "content": "hi"}], "id": 7}\n{"prompt": "hi"}\n'
    )
    requests = read_requests(path, "", raw=False)
    assert [(r.index, r.prompt, r.id) for r in requests] == [
        (0, (USER,), "a"),
        (1, (USER,), 7),
        (2, (USER,), None),
    ]
    assert requests[1].where == f"{path}:3", "lines are counted as an editor counts them"


def test_a_system_prompt_comes_first_unless_the_chat_has_its_own(file):
    own = '{"messages": [{"role": "system", "content": "rhyme"}, {"role": "user", "content": "hi"}]}\n'
    requests = read_requests(file('{"prompt": "hi"}\n' + own), "be brief", raw=False)
    assert requests[0].prompt == (SYSTEM, USER)
    assert requests[1].prompt == ({"role": "system", "content": "rhyme"}, USER)


def test_a_text_file_has_a_prompt_per_line_and_is_recognised_by_suffix_or_first_line(file):
    braces = '{"prompt": "hi"}\n'
    assert [r.prompt for r in read_requests(file("one\n\n two \n", "in.txt"), "", raw=True)] == ["one", "two"]
    assert read_requests(file(braces, "in.txt"), "", raw=True)[0].prompt == braces.strip()
    assert read_requests(file(braces, "in"), "", raw=True)[0].prompt == "hi"
    assert read_requests(file("hi\n{", "in"), "", raw=True)[1].prompt == "{"


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": "a"', r"in.jsonl:2: must be one JSON object"),
        ('"a"', r"""in.jsonl:2: must be a JSON object .*write {"prompt": "…"} or"""),
        (b'{"prompt": "\xff"}', r"in.jsonl:2: must be UTF-8, got byte 0xff"),
        ('{"question": "a"}', r"in.jsonl:2: must have either prompt or messages, got \['question'\]"),
        ('{"prompt": "a", "messages": []}', r"in.jsonl:2: must have either prompt or messages"),
        ('{"prompt": " "}', r"in.jsonl:2: prompt must be a text, got ' '"),
        ('{"prompt": 5}', r"in.jsonl:2: prompt must be a text, got 5"),
        (r'{"prompt": "\ud83d"}', r"in.jsonl:2: prompt must be a text"),
        ('{"messages": []}', r"in.jsonl:2: messages must be a chat"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"in.jsonl:2: .*ends with the user"),
        ('{"prompt": "a", "id": true}', r"in.jsonl:2: id must be a text or a whole number, got True"),
        ('{"prompt": "a", "id": [1]}', r"in.jsonl:2: id must be"),
        (r'{"prompt": "a", "id": "\ud83d"}', r"in.jsonl:2: id must be"),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', r"in.jsonl:2: messages must be a chat"),
    ],
)
def test_a_bad_line_is_named_with_the_rule_in_one_line(file, line, rule):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(DataError, match=rule) as caught:
        read_requests(file(b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good"}\n'), "", raw=False)
    assert "\n" not in str(caught.value)


def test_raw_text_has_no_turns(file):
    with pytest.raises(DataError, match=r"in.jsonl:1: must have a prompt when --raw is given"):
        read_requests(file('{"messages": [{"role": "user", "content": "hi"}]}'), "", raw=True)


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in"])
def test_an_empty_and_a_missing_file_are_refused(file, name):
    with pytest.raises(DataError, match="must have a prompt, got an empty file; check --batch"):
        read_requests(file("\n", name), "", raw=False)
    with pytest.raises(DataError, match="cannot be read: No such file or directory; check --batch"):
        read_requests(file("", name).with_name(f"absent-{name}"), "", raw=False)
