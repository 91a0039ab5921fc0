"""The built-in task: six kinds of short word problem with integer answers, generated on demand.

It needs no file and no network, and it is the same on every machine: operands come from BLAKE2, never
from Python's `hash` or `random`. Each kind has its worked solution (`Kind.steps`). The answer and the careless
teacher of the embedded model are both derived from it. The task does not depend on a model.

One operand tuple in ten of each kind is held out, for every seed and every wording. If the first two operands
commute, both orders are in the same split. A *step* of a held-out problem may still occur inside a training problem
of another kind: 21+41 ends the problem 7*3+41.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Literal, overload

from grpo_actors.tasks.task import Problem, Split, Task

Operator = Literal["+", "-", "*"]
#: ``left operator right``; each side names an operand (``a`` … ``d``) or, as ``_``, the previous result.
Step = tuple[str, Operator, str]

#: The smallest operand space (a difference, 4,851 pairs) still gives this many problems without a repeat.
MAX_TRAIN_SIZE = 24_000
MAX_EVAL_SIZE = 1_800


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem: its operands, its worked solution, its wordings."""

    name: str
    #: Lowest and highest value of operands a, b, …, both included.
    ranges: tuple[tuple[int, int], ...]
    #: Worked solution; no intermediate result may be negative.
    steps: tuple[Step, ...]
    #: Texts with ``{a}``, ``{b}``, … in place of the operands; the operands decide which one is used.
    wordings: tuple[str, ...]
    #: Whether a and b may be exchanged without changing the problem.
    commutes: bool = False

    @property
    def subtracts(self) -> bool:
        """Return whether a step is a difference, without which no result is negative."""
        return any(operator == "-" for _, operator, _ in self.steps)

    def results(self, operands: Sequence[int]) -> list[int]:
        """Return the result of each step; the last one is the answer."""
        values = dict(zip("abcd", operands, strict=False))
        results = []
        for left, operator, right in self.steps:
            values["_"] = apply(values[left], operator, values[right])
            results.append(values["_"])
        return results


def apply(left: int, operator: Operator, right: int) -> int:
    """Return the value of `left operator right`."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right


_DIGIT, _NUMBER = (2, 9), (2, 99)

KINDS: tuple[Kind, ...] = (
    Kind(
        "add",
        (_NUMBER, _NUMBER),
        (("a", "+", "b"),),
        ("There are {a} pears and {b} plums. How many are there in all?",),
        commutes=True,
    ),
    Kind(
        "subtract",
        (_NUMBER, _NUMBER),
        (("a", "-", "b"),),
        (
            "There are {a} pears and {b} are eaten. How many are left?",
            "Ann has {a} coins and gives away {b}. How many are left?",
            "Ann has {a} coins and Bob has {b}. How many more has Ann?",
        ),
    ),
    Kind(
        "add_subtract",
        (_NUMBER, _NUMBER, _NUMBER),
        (("a", "+", "b"), ("_", "-", "c")),
        ("There are {a} people on a bus. {b} get on and {c} get off. How many are left?",),
        commutes=True,
    ),
    Kind(
        "multiply_add",
        (_DIGIT, _DIGIT, _NUMBER),
        (("a", "*", "b"), ("_", "+", "c")),
        ("There are {a} bags of {b} pears and {c} more. How many are there in all?",),
        commutes=True,
    ),
    Kind(
        "subtract_product",
        (_DIGIT, _DIGIT, _NUMBER),
        (("a", "*", "b"), ("c", "-", "_")),
        ("Ann has {c} coins and buys {a} pens for {b} each. How many are left?",),
        commutes=True,
    ),
    Kind(
        "digit_sum",
        ((1, 9), (0, 9), (0, 9), (0, 9)),
        (("a", "+", "b"), ("_", "+", "c"), ("_", "+", "d")),
        ("What is the sum of the digits of {a}{b}{c}{d}?",),
    ),
)


class Arithmetic(Task):
    """Six kinds of problem in equal shares, each with one user turn and no system prompt.

    The train split depends on `seed`. The eval split does not, so that accuracies of different runs refer to the
    same problems. No problem occurs twice in a split.
    """

    default_rewards: Mapping[str, float] = {"correctness": 1.0, "strict_format": 0.2}

    def __init__(self, seed: int, train_size: int = 20_000, eval_size: int = 1_200) -> None:
        for name, size, most in (
            ("train_size", train_size, MAX_TRAIN_SIZE),
            ("eval_size", eval_size, MAX_EVAL_SIZE),
        ):
            if not 0 < size <= most:
                raise ValueError(f"Arithmetic: {name} must be between 1 and {most}, got {size}")
        self._made_of = (seed, train_size)
        super().__init__(
            ArithmeticProblems("train", f"train/{seed}", train_size),
            ArithmeticProblems("eval", "eval", eval_size),
        )

    def digest(self) -> str:
        """Return a digest of what the problems depend on; to word all of them takes seconds."""
        return _hash(f"arithmetic/{self._made_of}").to_bytes(16, "big").hex()[:16]


class ArithmeticProblems(Sequence[Problem]):
    """One split. A kind's operands are drawn when its first problem is accessed, and each problem is worded at its access."""

    def __init__(self, split: Split, stream: str, size: int) -> None:
        self._split: Split = split
        self._stream = stream
        self._size = size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        positions = range(self._size)[index]  # raises IndexError, resolves negative numbers and slices
        if isinstance(positions, range):
            return [self[position] for position in positions]
        turn, kind = divmod(positions, len(KINDS))
        turns = -(-self._size // len(KINDS))
        return pose(KINDS[kind], _first(turns, KINDS[kind], self._split, self._stream)[turn])


def pose(kind: Kind, operands: Sequence[int]) -> Problem:
    """Return the problem of `kind` with these operands. The problem and its id depend on nothing else."""
    wording = kind.wordings[_hash(f"wording/{kind.name}/{operands}") % len(kind.wordings)]
    text = wording.format(**dict(zip("abcd", operands, strict=False)))
    return Problem(
        id="-".join([kind.name, *map(str, operands)]),
        messages=({"role": "user", "content": text},),
        answer=str(kind.results(operands)[-1]),
        columns={"kind": kind.name, "operands": list(operands)},
        mathematics=True,
    )


def split_of(kind: Kind, operands: Sequence[int]) -> Split:
    """Return the split of these operands, which is the same in every run: one tuple in ten is held out."""
    first_two = sorted(operands[:2]) if kind.commutes else operands[:2]
    key = ",".join(map(str, [*first_two, *operands[2:]]))
    return "eval" if _hash(f"split/{kind.name}/{key}") % 10 == 0 else "train"


def draws(kind: Kind, stream: str) -> Iterator[tuple[int, ...]]:
    """Yield operand tuples of a kind without end and with repeats, such that no result is negative."""
    number, subtracts = 0, kind.subtracts
    while True:
        rest = _hash(f"draw/{stream}/{kind.name}/{number}")
        number += 1
        operands = []
        for low, high in kind.ranges:
            rest, offset = divmod(rest, high - low + 1)
            operands.append(low + offset)
        if not subtracts or min(kind.results(operands)) >= 0:
            yield tuple(operands)


#: A process opens the task several times (to check, to train, to evaluate); drawing 20,000 problems takes 0.3 s.
@lru_cache(maxsize=4 * len(KINDS))
def _first(count: int, kind: Kind, split: Split, stream: str) -> tuple[tuple[int, ...], ...]:
    """Return the first `count` different operand tuples of a split. The MAX_…_SIZE bounds make sure that it ends."""
    kept: dict[tuple[int, ...], None] = {}  # an ordered set
    for operands in draws(kind, stream):
        if len(kept) == count:
            break
        if split_of(kind, operands) == split:
            kept[operands] = None
    return tuple(kept)


def _hash(text: str) -> int:
    """Return a hash of the text with 128 bits, the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "big")
