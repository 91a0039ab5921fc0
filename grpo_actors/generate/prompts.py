"""Read prompts: one text, or a file that is checked line by line before any model is loaded. No MLX.

A file is JSON Lines (``prompt``, a text, or ``messages``, a chat, and optionally an ``id``; other columns are
ignored), or a text file with one prompt per line. The suffix ``.jsonl`` or ``.txt`` decides; with any other suffix the
first line does.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_actors.errors import DataError
from grpo_actors.tasks.chat import read_chat
from grpo_actors.tasks.lines import excerpt, read_lines, read_rows
from grpo_actors.tasks.task import Message

#: A chat that ends with the user's turn; or a raw text to continue.
Prompt = tuple[Message, ...] | str

SETTING = "--batch"
EXAMPLE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of a file."""

    #: Index among the file's prompts, from 0.
    index: int
    prompt: Prompt
    #: The id given in the file; None: none.
    id: str | int | None
    #: File and line, for errors.
    where: str


def as_prompt(text: str, system: str, *, raw: bool) -> Prompt:
    """Return a user's text as a prompt: a chat, after `system` unless that is empty; with `raw` the text itself."""
    return text if raw else with_system(({"role": "user", "content": text},), system)


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """Put the system prompt before the chat, unless it is empty or the chat has its own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)


def is_encodable(text: str) -> bool:
    """Return whether the text encodes to UTF-8: JSON and terminals can yield half a surrogate pair, which tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_requests(path: Path, system: str, *, raw: bool) -> list[Request]:
    """Read all prompts of a file, in its order.

    Raises:
        DataError: the file is unreadable or empty, or a line is not a prompt; the text names it.
    """
    requests = [
        Request(index, prompt, own_id, where)
        for index, (prompt, own_id, where) in enumerate(_read(path, system, raw=raw))
    ]
    if not requests:
        raise DataError(f"{path}: must have a prompt, got an empty file; check {SETTING}")
    return requests


def digest(path: Path) -> str:
    """Return the sha256 of the file."""
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
        chat = _chat(value)
        if not chat or not all(is_encodable(message["content"]) for message in chat):
            raise DataError(
                f"{where}: messages must be a chat that ends with the user "
                f'([{{"role": "user", "content": "…"}}]), got {excerpt(value)}; mend the line'
            )
        return with_system(chat, system)
    if not isinstance(value, str) or not value.strip() or not is_encodable(value):
        raise DataError(f"{where}: prompt must be a text, got {excerpt(value)}; mend the line")
    return as_prompt(value, system, raw=raw)


def _chat(value: object) -> tuple[Message, ...]:
    """Return a chat that ends with the user; empty if the value is none."""
    try:
        chat = read_chat(value)
    except DataError:
        return ()
    return chat if chat[-1]["role"] == "user" else ()


def _id(row: dict[str, Any], where: str) -> str | int | None:
    value = row.get("id")
    # `type`, not isinstance: JSON's true is an int in Python.
    if value is None or type(value) is int or (isinstance(value, str) and is_encodable(value)):
        return value
    raise DataError(f"{where}: id must be a text or a whole number, got {excerpt(value)}; mend the line")
