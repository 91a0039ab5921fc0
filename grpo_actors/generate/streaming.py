"""Text from tokens that come one by one: all pieces together are the text of all tokens.

mlx-lm's detokenizers drop a leading space, or wait for the end of a word; this one asks the tokenizer itself, about
the last few tokens only. Knows tokens and text; refuses to know where either goes.
"""

from grpo_actors.policy.model import Policy

#: What a tokenizer makes of bytes that are no whole character.
CUT = "\ufffd"

#: Control characters mean something to a terminal, and a model may sample them. Line feed and tab may stay.
_NOT_SHOWN = {code: CUT for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t\r"} | {13: None}


class Detokenizer:
    """Pieces of text, each as soon as its last character is whole; a stop token has no text."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tokens: list[int] = []
        #: Tokens before `_said` have been said; those from `_context` on are decoded again with the next ones, as
        #: a tokenizer may treat the first of a text otherwise than the others.
        self._context = self._said = 0

    def add(self, token: int) -> str:
        """The text that this token makes certain; empty where a character is still cut."""
        self._tokens.append(token)
        return self._take(whole=True)

    def rest(self) -> str:
        """After the last token: what was held back."""
        return self._take(whole=False)

    def _take(self, *, whole: bool) -> str:
        text = self._policy.decode(self._tokens[self._context :])
        before = self._policy.decode(self._tokens[self._context : self._said])
        if len(text) <= len(before) or (whole and text.endswith(CUT)):
            return ""
        self._context, self._said = self._said, len(self._tokens)
        return text[len(before) :]


def for_terminal(text: str) -> str:
    """The text without what a terminal would obey."""
    return text.translate(_NOT_SHOWN)
