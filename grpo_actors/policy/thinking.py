"""Tell thinking from answer: the tags of a model, the parts of a turn, and the bound on the tokens of its thinking.

A model thinks between two tags and answers after the second one. Some templates write the first tag themselves, at the
end of the prompt, so that it is missing in the completion. Knows the tags and a tokenizer, not what is sampled or graded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Tags(NamedTuple):
    """The texts of one model family."""

    start: str
    end: str
    #: What ends thinking if the model does not; empty: `end` itself.
    closing: str = ""
    #: Tokens that only this family has; empty: the two tags are tokens themselves.
    marks: tuple[str, ...] = ()


#: The first one whose tokens a vocabulary has is the model's.
TAGS = (
    Tags("<think>", "</think>"),
    Tags("<longcat_think>", "</longcat_think>"),
    Tags("<|think:start|>", "<|think:end|>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<|channel>thought", "<channel|>", marks=("<|channel>", "<channel|>")),  # Gemma 4
    Tags(
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        closing="<|end|><|start|>assistant<|channel|>final<|message|>",
        marks=("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
    ),  # gpt-oss
)


class Parts(NamedTuple):
    """A turn, divided at its last closing tag."""

    #: The text between the tags, without surrounding white space; None if there is no closing tag.
    thoughts: str | None
    #: The text after the closing tag; all of it if the turn has no thinking, and empty if its thinking never ends.
    answer: str


@dataclass(frozen=True)
class Thinking:
    """The tags of one model, as texts and, if its vocabulary has them, as tokens."""

    tags: Tags
    #: Token ids of the tags and of `Tags.closing`; empty if the vocabulary lacks them: then only texts are divided.
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    def opened_by(self, text: str) -> bool:
        """Return whether a turn begins within its thinking, given the text before it or the last part of that."""
        return text.rstrip().endswith(self.tags.start)

    def divide(self, text: str, *, opened: bool) -> Parts:
        """Divide the text of a turn; `opened`: the opening tag is in the prompt."""
        before, closed, answer = text.rpartition(self.tags.end)
        if closed:
            _, _, inside = (
                before.partition(self.tags.start) if self.tags.start in before else ("", "", before)
            )
            return Parts(inside.strip(), answer)
        return Parts(None, "" if opened or self.tags.start in text else text)

    def length(self, turn: Sequence[int], *, opened: bool) -> int:
        """Return the number of tokens between the tags in a turn; thinking that never ends counts too."""
        count = 0
        at = 0 if opened else _after(turn, self.start, 0)
        while at is not None:
            after = _after(turn, self.end, at)
            if after is None:
                return count + len(turn) - at
            count += after - len(self.end) - at
            at = _after(turn, self.start, after)
        return count


class Budget:
    """Counts the tokens of one turn's thinking while they are sampled, and says when it has to end."""

    def __init__(self, thinking: Thinking, tokens: int, *, opened: bool) -> None:
        """Allow `tokens` tokens of thinking; `opened`: the opening tag is in the prompt."""
        self._thinking = thinking
        self._left = tokens
        self._open = opened

    def is_spent(self, turn: Sequence[int]) -> bool:
        """Count the last token of `turn`, the tokens so far; return whether the closing tag has to follow now."""
        tag = self._thinking.end if self._open else self._thinking.start
        if tuple(turn[-len(tag) :]) == tag:
            self._open = not self._open
        elif self._open:
            self._left -= 1
        return self._open and self._left <= 0

    def missing(self, turn: Sequence[int]) -> tuple[int, ...]:
        """Return what is missing of the closing tag at the end of `turn`: the model may have written its first tokens."""
        closing = self._thinking.closing
        begun = len(closing) - 1
        while tuple(turn[len(turn) - begun :]) != closing[:begun]:
            begun -= 1
        return closing[begun:]

    def close(self) -> None:
        """Note that the closing tag was inserted."""
        self._open = False


def thinking_of(tokenizer: Any) -> Thinking:
    """Return the tags of a tokenizer's model; those of most models, as texts only, if its vocabulary has none."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    for tags in TAGS:
        if all(token in vocabulary for token in tags.marks or (tags.start, tags.end)):
            start, end, closing = (
                tuple(tokenizer.encode(text, add_special_tokens=False))
                for text in (tags.start, tags.end, tags.closing or tags.end)
            )
            return Thinking(tags, start, end, closing)
    return Thinking(TAGS[0])


def _after(tokens: Sequence[int], tag: tuple[int, ...], at: int) -> int | None:
    """Return the index after the first occurrence of `tag` in `tokens` from `at` on; None: there is none."""
    for i in range(at, len(tokens) - len(tag) + 1):
        if tokens[i] == tag[0] and tuple(tokens[i : i + len(tag)]) == tag:
            return i + len(tag)
    return None
