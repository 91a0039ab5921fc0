"""Read a chat as data sets have them: a list of turns with role and content, and what else their makers left in it."""

from collections.abc import Mapping
from typing import Any

from grpo_actors.errors import DataError
from grpo_actors.tasks.task import Message

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_chat(value: object) -> tuple[Message, ...]:
    """Return the turns, each with role and text. Keys without a value, and keys that no prompt has, are left out.

    Parts of a content are joined if all are text. A chat ends with the user or a tool, or with the beginning of the
    assistant's answer, which a completion continues.

    Raises:
        DataError: It is no chat that can be trained on; the text says what it must be.
    """
    if not isinstance(value, list) or not value:
        raise DataError('must be a text, not empty, or a chat ([{"role": "user", "content": "…"}])')
    chat = tuple(_turn(turn) for turn in value)
    if not any(turn["role"] == "user" for turn in chat):
        raise DataError("must have a turn of the user")
    last = chat[-1]
    if last["role"] not in ("user", "tool", "assistant"):
        raise DataError(f"must end with the user, a tool or the assistant, not with {last['role']}")
    if not last["content"].strip():
        raise DataError(f"must not end with an empty turn of {last['role']}")
    return chat


def _turn(turn: object) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise DataError("must be a chat of turns with role and content")
    role, content = turn["role"], turn.get("content")
    if role not in ROLES:
        raise DataError(f"must have turns of {', '.join(ROLES)}, not of {role[:40]!r}")
    if content is None and role == "assistant":
        content = ""  # it has called a tool
    return {"role": role, "content": content if isinstance(content, str) else _joined(content)}


def _joined(parts: Any) -> str:
    """Return the text of a content that is a list of parts."""
    if not isinstance(parts, list) or not parts:
        raise DataError("must have turns whose content is a text or a list of parts")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in (None, "text") or not isinstance(text, str):
            raise DataError(f"must have parts of text only, not of {str(kind)[:40]!r}")
        texts.append(text)
    return "".join(texts)
