"""What a task is: problems to pose, and the rewards that judge an answer to them.

A task owns its prompt and its rewards together. It knows no model, no tokenizer, no socket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_actors.tasks.answers import canonical_answer, extract_answer, same_answer

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


class Task:
    """A source of problems, and how an answer to one is judged. The two splits never share a problem.

    Each task is a subclass with a row in `config.data.TASKS`. The parameters of its constructor are named like the
    settings of section [data] that it reads, and ``seed``: they are passed by name. It ends with ``super().__init__``.
    Answers are read as the rewards read them, from ``<answer>…</answer>``, unless a subclass does it in another way.
    """

    #: Reward name -> weight, used where the configuration names no rewards.
    default_rewards: Mapping[str, float]

    def __init__(self, train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
        self.splits: dict[Split, Sequence[Problem]] = {"train": train, "eval": held_out}

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in the data's own order; cheap to index, `len` known."""
        return self.splits[split]

    def is_correct(self, completion: str, problem: Problem) -> bool:
        """Whether the completion answers its problem right, as a number or as text: what the evaluator counts."""
        return same_answer(extract_answer(completion), problem.answer)

    def answer_of(self, completion: str) -> str:
        """The answer that a completion gives, in the one form that all equal answers have; empty: none.

        What a majority vote counts.
        """
        return canonical_answer(extract_answer(completion))
