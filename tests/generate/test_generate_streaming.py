"""The streamed pieces together are the text of all tokens."""

import random

import pytest

from grpo_actors.generate.streaming import Detokenizer, for_terminal
from grpo_actors.policy.model import Policy

#: One to four bytes a character; a letter with a combining mark; a family of four joined emoji.
TEXTS = [
    "12 + 34",
    " leading and trailing ",
    "é€😀",
    "e\u0301 👨‍👩‍👧‍👦 你好\n\n\tx",
    "\ufffd is a character too",
]


def pieces(policy: Policy, tokens):
    detokenizer = Detokenizer(policy)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.rest()]


@pytest.mark.parametrize("text", TEXTS)
def test_all_pieces_are_the_text_and_none_ends_within_a_character(tiny, text):
    tokens = tiny.tokenizer.encode(text, add_special_tokens=False)
    said = pieces(tiny, tokens)
    assert "".join(said) == text
    cut = [piece for piece in said if "\ufffd" in piece and "\ufffd" not in text]
    assert cut == []


def test_a_character_is_returned_with_its_last_byte(tiny):
    # The embedded tokenizer encodes an unknown character as bytes: four for this one.
    tokens = tiny.tokenizer.encode("😀", add_special_tokens=False)
    assert len(tokens) == 4
    assert pieces(tiny, tokens) == ["", "", "", "😀", ""]


def test_any_tokens_are_streamed_as_they_decode(tiny):
    numbers = random.Random(0)
    for _ in range(200):
        tokens = [t for t in numbers.choices(range(300), k=20) if t not in tiny.stop_tokens]
        assert "".join(pieces(tiny, tokens)) == tiny.decode(tokens)


def test_a_stop_token_has_no_text_but_a_character_that_it_cut_has(tiny):
    stop = min(tiny.stop_tokens)
    assert pieces(tiny, [*tiny.tokenizer.encode("46", add_special_tokens=False), stop])[-2:] == ["", ""]
    broken = [*tiny.tokenizer.encode("😀", add_special_tokens=False)[:2], stop]
    assert "".join(pieces(tiny, broken)) == tiny.decode(broken) == "\ufffd"


def test_a_terminal_gets_no_control_characters():
    assert for_terminal("a\tb\r\nc\x1b[2Jd\x07\x9b é 👨‍👩‍👧‍👦") == "a\tb\nc\ufffd[2Jd\ufffd\ufffd é 👨‍👩‍👧‍👦"
    # The first and the last code of both ranges, and the characters next to them.
    assert for_terminal("\x00\x1f ~\x7f\x9f\xa0") == "\ufffd\ufffd ~\ufffd\ufffd\xa0"
