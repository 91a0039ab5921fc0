"""What is asked: one prompt, or a file of them, checked line by line before anything is loaded. No MLX.

A file is JSON Lines (``prompt``, a text, or ``messages``, a chat, and if you like an ``id``; other columns are
not read), or a text with one prompt a line. ``.jsonl`` and ``.txt`` say which; without them its first line does.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_actors.errors import DataError
from grpo_actors.tasks.jsonl import is_chat
from grpo_actors.tasks.lines import excerpt, read_lines, read_rows
from grpo_actors.tasks.task import Message

#: A chat that ends with the user's turn; or a text, to be gone on with as it stands.
Prompt = tuple[Message, ...] | str

SETTING = "--batch"
EXAMPLE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of a file."""

    #: Its place among the file's prompts, from 0.
    index: int
    prompt: Prompt
    #: The file's own name for it; None: it has none.
    id: str | int | None
    #: File and line.
    where: str


def as_prompt(text: str, system: str, *, raw: bool) -> Prompt:
    """A user's text as the model is asked it: in a chat, after `system` unless that is empty, or as it stands."""
    return text if raw else with_system(({"role": "user", "content": text},), system)


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The chat after the system prompt, unless that is empty or the chat has its own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)


def is_encodable(text: str) -> bool:
    """Whether it is Unicode: JSON and a terminal can smuggle in half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_requests(path: Path, system: str, *, raw: bool) -> list[Request]:
    """All prompts of a file, in its order.

    Raises:
        DataError: the file is unreadable or empty, or a line is no prompt; names it.
    """
    requests = [
        Request(index, prompt, own_id, where)
        for index, (prompt, own_id, where) in enumerate(_read(path, system, raw=raw))
    ]
    if not requests:
        raise DataError(f"{path}: must have a prompt, got an empty file; check {SETTING}")
    return requests


def digest(path: Path) -> str:
    """sha256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, system: str, *, raw: bool) -> Iterator[tuple[Prompt, str | int | None, str]]:
    if not _is_jsonl(path):
        for number, text in read_lines(path, setting=SETTING):
            yield as_prompt(text, system, raw=raw), None, f"{path}:{number}"
        return
    for number, row in read_rows(path, setting=SETTING, example=EXAMPLE):
        where = f"{path}:{number}"
        yield _prompt(row, system, where, raw=raw), _id(row, where), where


def _is_jsonl(path: Path) -> bool:
    if path.suffix in (".jsonl", ".txt"):
        return path.suffix == ".jsonl"
    return next((text.startswith("{") for _, text in read_lines(path, setting=SETTING)), False)


def _prompt(row: dict[str, Any], system: str, where: str, *, raw: bool) -> Prompt:
    given = [name for name in ("prompt", "messages") if name in row]
    if len(given) != 1:
        raise DataError(
            f"{where}: must have either prompt or messages, got {excerpt(list(row))}; write {EXAMPLE}"
        )
    value = row[given[0]]
    if given == ["messages"]:
        if raw:
            raise DataError(f"{where}: must have a prompt when --raw is given, got messages")
        if not is_chat(value) or not all(is_encodable(message["content"]) for message in value):
            raise DataError(
                f"{where}: messages must be a chat that ends with the user "
                f'([{{"role": "user", "content": "…"}}]), got {excerpt(value)}; mend the line'
            )
        return with_system(tuple(value), system)
    if not isinstance(value, str) or not value.strip() or not is_encodable(value):
        raise DataError(f"{where}: prompt must be a text, got {excerpt(value)}; mend the line")
    return as_prompt(value, system, raw=raw)


def _id(row: dict[str, Any], where: str) -> str | int | None:
    value = row.get("id")
    # JSON's true is Python's 1.
    if value is None or type(value) is int or (isinstance(value, str) and is_encodable(value)):
        return value
    raise DataError(f"{where}: id must be a text or a whole number, got {excerpt(value)}; mend the line")
