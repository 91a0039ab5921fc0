r"""The reward ``math_verify``: whether an answer is mathematically the true one, by the library of that name.

1/2, 0.5 and \frac{1}{2} are equal, so are 1,000 and 1000, 2x+1 and 1+2x. Reading an expression may take for
ever, and a completion is unchecked input: this runs where a user's own rewards do, in the process that can be
killed. The library's time-outs are off: they would take that process's timer away.
"""

import logging
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from grpo_actors.tasks.answers import extract_answer
from grpo_actors.tasks.rewards import Chat, text
from grpo_actors.tasks.time_limit import time_limit

#: Reading and comparing an answer takes milliseconds; one that takes longer is wrong.
ANSWER_S = 1.0

#: Of a completion without an answer in tags only the end is read: the library's patterns are slow.
MAX_CHARACTERS = 2000

# It warns, once a process, that the time-outs are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_verify(
    prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """1 where the text in ``<answer>`` tags, or else the whole completion, holds an answer equal to the true one.

    None for all where the true answer itself cannot be read as mathematics.
    """
    del prompts, columns
    true = _read(_expression(answer[0]))
    if not true:
        return [None] * len(completions)
    return [_agrees(text(completion), true) for completion in completions]


def _agrees(written: str, true: list[Any]) -> float:
    given = extract_answer(written)
    try:
        with time_limit(ANSWER_S):
            read = _read(_expression(given) if given else written[-MAX_CHARACTERS:])
            return float(verify(true, read, timeout_seconds=None))
    except TimeoutError:
        return 0.0


def _expression(answer: str) -> str:
    """The answer as LaTeX between dollar signs, all of it: else the library takes the 2 of 2x+1 for the answer."""
    marked = any(mark in answer for mark in ("$", r"\(", r"\[", r"\boxed"))
    return answer if marked else f"${answer}$"


def _read(expression: str) -> list[Any]:
    return parse(expression, parsing_timeout=None)  # type: ignore[no-any-return]
