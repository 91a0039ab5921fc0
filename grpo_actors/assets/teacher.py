"""Provide a careless teacher for the tiny model: it can solve every problem, but often guesses.

Reinforcement learning sharpens behaviour that a model already shows now and then; it does not teach a
model of this size to add. So the supervised start shows the right way of working for every kind of
problem, at a rate that leaves much to gain: for a kind where the teacher mostly guesses, the start's
greedy answer is a guess, and only some of its samples work the problem out.

This module depends on the task's kinds and plain text, not on a model or tokenizer.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_actors.tasks.arithmetic import KINDS, Arithmetic, Kind, Operator, apply, draws, split_of

_KIND = {kind.name: kind for kind in KINDS}
#: Operator -> the operator that is written instead by mistake.
_MISTAKEN: Mapping[Operator, Operator] = {"+": "-", "-": "+", "*": "+"}


@dataclass(frozen=True, slots=True)
class Carelessness:
    """The teacher's error rates: all are probabilities."""

    #: Kind -> a guess instead of a solution. Above one half, the start's greedy answer is a guess.
    guess: Mapping[str, float] = field(default_factory=dict)
    #: Per solution of several steps: the last step is missing.
    skip_last: float = 0.0
    #: Per step: another operator than the problem asks for.
    wrong_operator: float = 0.0
    #: Per step: a result that is slightly wrong.
    slip: float = 0.0
    #: Per completion: a tag is missing.
    broken_format: float = 0.0


CAREFUL = Carelessness()
#: A student of this teacher solves about a third of the problems when sampled at temperature 1.
CARELESS = Carelessness(
    guess={
        "add": 0.28,
        "subtract": 0.28,
        "add_subtract": 0.6,
        "multiply_add": 0.6,
        "subtract_product": 0.6,
        "digit_sum": 0.45,
    },
    skip_last=0.08,
    wrong_operator=0.05,
    slip=0.08,
    broken_format=0.12,
)


@dataclass(frozen=True, slots=True)
class Lesson:
    """A question with one completion by the teacher."""

    question: str
    completion: str


class Teacher:
    """An endless source of lessons about training problems, and of bare equations."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._problems = Arithmetic(seed).problems("train")
        self._draws = {kind.name: draws(kind, f"equations/{seed}") for kind in KINDS}

    def lesson(self, care: Carelessness) -> Lesson:
        """Draw a training problem and answer it with the error rates `care`."""
        problem = self._rng.choice(self._problems)
        columns = problem.columns
        reasoning, answer = self._work(_KIND[columns["kind"]], columns["operands"], care)
        return Lesson(problem.messages[-1]["content"], self._write(reasoning, answer, care))

    def equations(self, count: int) -> str:
        """Return `count` right equations, like the steps of solutions: ``"7*3=21. 21+41=62. "``."""
        return "".join(f"{self._equation()}. " for _ in range(count))

    def _equation(self) -> str:
        """Return one step of a random training problem; held-out problems are never drawn."""
        while True:
            kind = self._rng.choice(KINDS)
            operands = next(self._draws[kind.name])
            if split_of(kind, operands) == "train":
                written = _steps(kind, operands)
                return self._rng.choice(written)

    def _work(self, kind: Kind, operands: Sequence[int], care: Carelessness) -> tuple[str, int]:
        """Return the text inside the reasoning tags, and the answer that follows from it."""
        if self._rng.random() < care.guess.get(kind.name, 0.0):
            guess = max(0, kind.results(operands)[-1] + self._rng.randint(-12, 12))
            return f"That is about {guess}.", guess
        steps = kind.steps
        if len(steps) > 1 and self._rng.random() < care.skip_last:
            steps = steps[:-1]
        values = dict(zip("abcd", operands, strict=False))
        sentences = []
        for left, operator, right in steps:
            a, b = values[left], values[right]
            done = self._operator(a, operator, b, care)
            values["_"] = self._result(apply(a, done, b), care)
            sentences.append(f"{a}{done}{b}={values['_']}.")
        return " ".join(sentences), values["_"]

    def _operator(self, left: int, operator: Operator, right: int, care: Carelessness) -> Operator:
        mistaken = _MISTAKEN[operator]
        if self._rng.random() < care.wrong_operator and apply(left, mistaken, right) >= 0:
            return mistaken
        return operator

    def _result(self, right: int, care: Carelessness) -> int:
        if self._rng.random() < care.slip:
            return max(0, right + self._rng.choice((-10, -2, -1, 1, 2, 10)))
        return right

    def _write(self, reasoning: str, answer: int, care: Carelessness) -> str:
        if self._rng.random() < care.broken_format:
            broken = (
                f"<answer>{answer}</answer>",
                f"<reasoning>{reasoning}<answer>{answer}</answer>",
                f"<reasoning>{reasoning}</reasoning>{answer}",
                f"<reasoning>{reasoning}</reasoning><answer>{answer}",
            )
            return self._rng.choice(broken)
        return f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"


def _steps(kind: Kind, operands: Sequence[int]) -> list[str]:
    """Return the right solution, one string per step: ``["7*3=21", "21+41=62"]``."""
    values = dict(zip("abcd", operands, strict=False))
    written = []
    for (left, operator, right), result in zip(kind.steps, kind.results(operands), strict=True):
        written.append(f"{values[left]}{operator}{values[right]}={result}")
        values["_"] = result
    return written
