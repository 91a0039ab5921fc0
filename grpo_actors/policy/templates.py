"""The chat template of a tokenizer: which one is used, and the tokens with which it ends a turn of the assistant.

A template is a program in Jinja that came with the model. Some tokenizers have several, each with a name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from grpo_actors.errors import ModelError

#: What a template can raise.
TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, MemoryError),
)
#: Stands for the assistant's words in an invented conversation; no template contains it.
PLACEHOLDER = "\N{WHITE SQUARE}said\N{WHITE SQUARE}"
_QUESTION = {"role": "user", "content": "?"}
_ANSWER = {"role": "assistant", "content": PLACEHOLDER}


def choose(tokenizer: Any, wanted: str, name: str) -> str:
    """Make `wanted` the template of mlx-lm's wrapper of a tokenizer; return the template's text, "" if it is the default.

    Args:
        tokenizer: The wrapper.
        wanted: The name of one of its templates, or the text of a template; empty: its default.
        name: The model's name, for error messages.

    Raises:
        ModelError: There is no template of this name, or there are several and no default.
    """
    known = tokenizer.chat_template if isinstance(tokenizer.chat_template, Mapping) else {}
    names = ", ".join(known)
    if not wanted or (wanted == "default" and not known):
        if known and "default" not in known:
            raise ModelError(
                f"data.chat_template: must name one of the templates of {name}, which has no default: {names}"
            )
        return ""
    if wanted not in known and "{" not in wanted:
        has = (
            f"or the name of a template of {name} ({names})"
            if known
            else f"{name} has no templates with names"
        )
        raise ModelError(f"data.chat_template: must be a Jinja file, {has}, got {wanted!r}")
    text: str = known.get(wanted, wanted)
    tokenizer.chat_template = text
    tokenizer.has_chat_template = True
    tokenizer._chat_template = None  # noqa: SLF001 - mlx-lm's own function for some architectures, which comes first
    return text


def after_answer(tokenizer: Any, render: Callable[[Sequence[Mapping[str, str]]], str]) -> list[int] | None:
    """Return the token ids that follow the assistant's words; None if the template shows no such words.

    They are those after the last turn of a conversation, where some templates end it in another way than before a
    question. If there are none, they are those before the next question, whose beginning then ends the turn.

    Args:
        tokenizer: mlx-lm's wrapper.
        render: Writes a conversation, and no beginning of an answer; raises one of `TEMPLATE_ERRORS`.
    """
    ids: list[int] | None = None
    for messages in ([_QUESTION, _ANSWER], [_QUESTION, _ANSWER, _QUESTION]):
        try:
            text = render(messages)
        except TEMPLATE_ERRORS:
            continue
        _, found, after = text.partition(PLACEHOLDER)
        if found:
            ids = tokenizer.encode(after, add_special_tokens=False)
        if after.strip():
            break
    return ids


def end_token(tokenizer: Any, ids: Sequence[int], stop_tokens: frozenset[int]) -> int | None:
    """Return the first special token of those `after_answer`; None if one of them is a stop token already, or none is special."""
    if not stop_tokens.isdisjoint(ids):
        return None
    special = tokenizer.added_tokens_decoder
    return next((token for token in ids if token in special and special[token].special), None)
