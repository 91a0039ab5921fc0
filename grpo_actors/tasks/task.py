"""The interface of a task: problems to pose, and the rewards that judge their answers.

A task defines its prompts together with its rewards. It does not depend on a model, a tokenizer or a socket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_actors.tasks.answers import canonical_answer, find_answer, same_answer

Split = Literal["train", "eval"]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, posed as a chat."""

    #: Unique in its task and the same in every run: shuffling, resume and recorded groups refer to it.
    id: str
    #: The chat so far; it ends with the user's turn.
    messages: tuple[Message, ...]
    #: The true answer as text.
    answer: str
    #: The columns of the data set with their own names and types, passed to own functions as keyword arguments.
    columns: Mapping[str, Any] = field(default_factory=dict)
    #: Whether the data set has a text as the prompt, not a chat: own rewards then get texts (`scoring`).
    text_prompt: bool = False
    #: Whether the answer is mathematics: other ways to write it then count too (`answers`).
    mathematics: bool = False


class Task:
    """A source of problems that can judge their answers. The two splits never share a problem.

    Each task is a subclass with a row in `config.data.TASKS`. The parameters of its constructor are passed by name:
    they are ``seed`` and the settings of section [data] that the task reads. The constructor ends with
    ``super().__init__``. Answers are read from ``<answer>…</answer>``, as the rewards do, unless a subclass overrides it.
    """

    #: Reward name -> weight, used if the configuration names no rewards.
    default_rewards: Mapping[str, float]

    def __init__(self, train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
        self.splits: dict[Split, Sequence[Problem]] = {"train": train, "eval": held_out}

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of a split in the order of the data; indexing and `len` are cheap."""
        return self.splits[split]

    def is_correct(self, completion: str, problem: Problem) -> bool:
        """Return whether the completion's answer is right, as a number or as text. The evaluator counts this."""
        lenient = problem.mathematics
        given = find_answer(completion, mathematics=lenient).text
        return same_answer(given, problem.answer, mathematics=lenient)

    def answer_of(self, completion: str, problem: Problem) -> str:
        """Return the answer of a completion in the form that all equal answers share; empty if there is none.

        A majority vote counts these.
        """
        lenient = problem.mathematics
        return canonical_answer(find_answer(completion, mathematics=lenient).text, mathematics=lenient)
