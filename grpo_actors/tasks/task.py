"""The interface of a task: problems to pose, and the rewards that judge their answers.

A task defines its prompts together with its rewards. It does not depend on a model, a tokenizer or a socket.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
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
    #: The true answer as text; empty if the data set has none.
    answer: str
    #: The columns of the data set with their own names and types, passed to own functions as keyword arguments.
    columns: Mapping[str, Any] = field(default_factory=dict)
    #: Whether the data set has a text as the prompt, not a chat: own rewards then get texts (`scoring`).
    text_prompt: bool = False
    #: Whether the answer is mathematics: other ways to write it then count too (`answers`).
    mathematics: bool = False
    #: Name of its source in a mixture; empty if there is no mixture.
    source: str = ""


def fit(problems: Sequence[Problem], unfit: Callable[[Problem], bool]) -> Sequence[Problem]:
    """Return the problems that are not unfit; all of those that are made on demand."""
    if not isinstance(problems, list):
        return problems
    return [problem for problem in problems if not unfit(problem)]


def shared_prompts(train: Iterable[Problem], held_out: Iterable[Problem]) -> int:
    """Return the number of training problems whose prompt is also held out."""
    prompts = {prompt_text(problem) for problem in held_out}
    return sum(prompt_text(problem) in prompts for problem in train)


def prompt_text(problem: Problem) -> str:
    """Return the prompt as one text, equal for equal prompts."""
    return json.dumps(problem.messages, sort_keys=True)


def digest(problems: Iterable[Problem]) -> str:
    """Return a digest of the problems: of their order, ids and contents."""
    hashed = blake2b(digest_size=8)
    for problem in problems:
        content = [problem.id, problem.messages, problem.answer, dict(problem.columns)]
        # Two lists of problems never give the same bytes: a line break inside a text is escaped.
        hashed.update(json.dumps(content, sort_keys=True, default=repr).encode() + b"\n")
    return hashed.hexdigest()


class Task:
    """A source of problems that can judge their answers. The two splits never share a problem.

    Each task is a subclass with a row in `config.data.TASKS`. The parameters of its constructor are passed by name:
    they are ``seed`` and the settings of section [data] that the task reads. The constructor ends with
    ``super().__init__``. Answers are read from ``<answer>…</answer>``, as the rewards do, unless a subclass overrides it.
    """

    #: Reward name -> weight, used if the configuration names no rewards.
    default_rewards: Mapping[str, float]
    #: What the user should know of the data, a line each.
    notes: Sequence[str] = ()

    def __init__(self, train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
        self.splits: dict[Split, Sequence[Problem]] = {"train": train, "eval": held_out}

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of a split in the order of the data; indexing and `len` are cheap."""
        return self.splits[split]

    def leave_out(self, unfit: Callable[[Problem], bool]) -> int:
        """Leave out unfit training problems and return their number. Problems that are made on demand are not asked."""
        train = self.splits["train"]
        kept = fit(train, unfit)
        self.splits["train"] = kept
        return len(train) - len(kept)

    def digest(self) -> str:
        """Return a digest of the training problems, which a resumed run must have again."""
        return digest(self.splits["train"])

    def train_sources(self) -> Mapping[str, Sequence[Problem]]:
        """Return the training problems by the name of their source; "" if they come from no mixture."""
        return {"": self.splits["train"]}

    def eval_sources(self) -> Mapping[str, Sequence[Problem]]:
        """Return the held-out problems by the name of their source, as `train_sources`."""
        return {"": self.splits["eval"]}

    def describe_splits(self) -> str:
        """Say how many problems are held out and how many train."""
        train, held_out = (len(self.splits[split]) for split in ("train", "eval"))
        share = held_out / (train + held_out)
        return f"{share:.0%} of the problems ({held_out:,}) are held out for evaluation, {train:,} are to train on"

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
