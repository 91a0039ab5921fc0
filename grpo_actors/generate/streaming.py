"""Decode tokens one by one: the pieces together are the text of all tokens.

mlx-lm's detokenizers drop a leading space, or wait for the end of a word. This one calls the tokenizer itself, on the
last few tokens only. It does not depend on where tokens come from or where the text goes.
"""

from grpo_actors.policy.model import Policy

#: The replacement character: a tokenizer's text for bytes that are not a complete character.
CUT = "\ufffd"

#: Control characters, which a model may sample and a terminal would interpret. Line feed and tab stay.
_NOT_SHOWN = {code: CUT for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t\r"} | {13: None}


class Detokenizer:
    """A streaming decoder: returns each piece of text when its last character is complete; a stop token has no text."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tokens: list[int] = []
        #: The text of the tokens before `_returned` has been returned. Tokens from `_context` on are decoded again
        #: with the next ones, because a tokenizer may treat the first token of a text differently.
        self._context = self._returned = 0

    def add(self, token: int) -> str:
        """Add a token and return the text that is now certain; empty while a character is incomplete."""
        self._tokens.append(token)
        return self._take(whole=True)

    def rest(self) -> str:
        """Return the remaining text after the last token."""
        return self._take(whole=False)

    def _take(self, *, whole: bool) -> str:
        text = self._policy.decode(self._tokens[self._context :])
        former = self._policy.decode(self._tokens[self._context : self._returned])
        if len(text) <= len(former) or (whole and text.endswith(CUT)):
            return ""
        self._context, self._returned = self._returned, len(self._tokens)
        return text[len(former) :]


def for_terminal(text: str) -> str:
    """Return the text without characters that a terminal would interpret."""
    return text.translate(_NOT_SHOWN)
