"""The chat template of a tokenizer: conversations to token ids, and the tokens with which it ends a turn of the assistant.

A template is a program in Jinja that came with the model. Some tokenizers have several, each with a name. Knows the
tokenizer, not the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateError

from grpo_actors.errors import ModelError
from grpo_actors.time_limit import time_limit

#: What a template can raise.
TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, MemoryError),
)
#: Longest time of a template in its first calls, in seconds. It takes milliseconds.
TEMPLATE_S = 5.0
#: Stands for the assistant's words in an invented conversation; no template contains it.
PLACEHOLDER = "\N{WHITE SQUARE}said\N{WHITE SQUARE}"
_QUESTION = {"role": "user", "content": "?"}
_ANSWER = {"role": "assistant", "content": PLACEHOLDER}


@dataclass(eq=False)
class ChatTemplate:
    """The template of one tokenizer, as a run or a user wants it."""

    #: The model's name, for error messages.
    name: str
    #: Returns mlx-lm's wrapper of the tokenizer, and waits while it is still being read; raises ModelError if it is unusable.
    read_tokenizer: Callable[[], Any]
    #: Raises ModelError if the model cannot read these ids, which are what the text says.
    check_readable: Callable[[Sequence[int], str], None]
    #: Text of a template that replaces the tokenizer's own; empty: none does.
    text: str = ""
    #: Variables of the template, such as enable_thinking; those that are missing have the template's own defaults.
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's wrapper of the tokenizer."""
        return self.read_tokenizer()

    @cached_property
    def turn_end(self) -> int | None:
        """The token with which the chat template ends a turn, if no token of the model's settings does."""
        return end_token(self.tokenizer, self._after_answer or (), self._own_ends)

    @property
    def ends_turns(self) -> bool:
        """Whether the chat template ends a turn with a token that ends a completion, or does not show how it ends one."""
        if self._after_answer is None or self.turn_end is not None:
            return True
        return not self._own_ends.isdisjoint(self._after_answer)

    @property
    def _own_ends(self) -> frozenset[int]:
        """The tokens that end a completion by the model's settings."""
        return frozenset(self.tokenizer.eos_token_ids)

    @cached_property
    def _after_answer(self) -> list[int] | None:
        """The tokens that the chat template writes after the assistant's words; None if it does not show that."""
        if not self.tokenizer.has_chat_template:
            return None
        return after_answer(self.tokenizer, partial(self.render, asks=False))

    def use(self, wanted: str, settings: Mapping[str, Any] | None = None) -> None:
        """Use another chat template than the default, or other settings, before anything else asks for the template.

        Args:
            wanted: As for `choose`.
            settings: The new `settings`; None: the present ones stay.

        Raises:
            ModelError: As `choose`.
        """
        self.text = choose(self.tokenizer, wanted, self.name)
        if settings is not None:
            self.settings = settings

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation, up to the beginning of the assistant's turn.

        If the last turn is the assistant's, the ids end with its text, which a completion continues.

        Raises:
            ModelError: there is no chat template, it refuses these turns, or it has tokens that the model cannot read.
        """
        if not self.tokenizer.has_chat_template:
            raise ModelError(
                f"{self.name}: its tokenizer has no chat template; use an instruction-tuned model, "
                "or set data.chat_template to a Jinja file"
            )
        try:
            text = self.render(messages)
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"{self.name}: its chat template refuses the turns {roles} ({error}); "
                'if it knows no system turn, leave that out (data.system_prompt = "")'
            ) from error
        # The text has the special tokens already.
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        self.check_readable(ids, "a prompt of its chat template")
        return ids

    def render(self, messages: Sequence[Mapping[str, str]], *, asks: bool = True) -> str:
        """Return a conversation as the chat template writes it.

        With `asks`, it ends at the beginning of the assistant's turn, or within that turn if it is the last.
        Raises one of `TEMPLATE_ERRORS` if the template does.
        """
        chat = [dict(message) for message in messages]
        continues = asks and chat[-1]["role"] == "assistant"
        settings = {
            **self.settings,
            "add_generation_prompt": asks and not continues,
            "continue_final_message": continues,
        }
        # Not by mlx-lm's wrapper, which would switch thinking on wherever the vocabulary has tags for it.
        own, inner = self.tokenizer._chat_template, self.tokenizer._tokenizer  # noqa: SLF001
        text: str = (
            inner.apply_chat_template(chat, tokenize=False, **settings)
            if own is None
            else own(chat, **settings)
        )
        return text

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Limit the time of chat template calls in the block, before anything depends on them. Only in the main thread.

        Raises:
            ModelError: the template does not end; later, nothing could interrupt it.
        """
        try:
            with time_limit(TEMPLATE_S, of_computing=True):
                yield
        except TimeoutError:
            raise ModelError(
                f"{self.name}: its chat template does not end within {TEMPLATE_S:g} s; set data.chat_template to another "
                "one, or choose another model"
            ) from None


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
