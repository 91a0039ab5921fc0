"""What a task is: problems to pose, and the rewards that judge an answer to them.

A task owns its prompt and its rewards together. It knows no model, no tokenizer, no socket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["train", "eval"]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, posed as a chat."""

    #: Unique in its task and the same in every run: shuffling, resume and the ledger go by it.
    id: str
    #: The conversation so far; ends with the user's turn.
    messages: tuple[Message, ...]
    #: The true answer, as text: what rewards receive as ``answer``.
    answer: str
    #: Further columns of the data set, handed to rewards as keyword arguments.
    columns: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A source of problems. The two splits never share a problem."""

    #: Reward name -> weight, used where the configuration names no rewards.
    default_rewards: Mapping[str, float]

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in the data's own order; cheap to index, `len` known."""
        ...

    def is_correct(self, completion: str, problem: Problem) -> bool:
        """Whether the text of a completion answers its problem right: what the evaluator counts."""
        ...

    def answer_of(self, completion: str) -> str:
        """The answer that a completion gives, in the one form that all equal answers have; empty: none.

        What a majority vote counts.
        """
        ...
