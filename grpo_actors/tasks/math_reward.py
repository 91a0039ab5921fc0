r"""The reward ``math_verify``: whether an answer is mathematically equal to the true one, by the library of that name.

1/2, 0.5 and \frac{1}{2} are equal, and so are 1,000 and 1000, or 2x+1 and 1+2x. Reading an expression may take
forever, and a completion is unchecked input. So this runs in the process of a user's own rewards, which can be
killed. The library's time-outs are off, because they would overwrite the timer of that process.
"""

import logging
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from grpo_actors.tasks.answers import extract_answer
from grpo_actors.tasks.rewards import Chat, text
from grpo_actors.time_limit import time_limit

#: Reading and comparing an answer takes milliseconds; an answer that takes longer is wrong.
ANSWER_S = 1.0

#: Number of last characters read of a completion without an answer in tags: the library's patterns are slow.
MAX_CHARACTERS = 2000

# The library warns once in each process that the time-outs are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_verify(
    prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """Return 1 if the text in ``<answer>`` tags, or else the whole completion, has an answer equal to the true one.

    Return None for all completions if the true answer itself cannot be read as mathematics.
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
    """Return the whole answer as LaTeX between dollar signs; otherwise the library reads 2x+1 as 2."""
    marked = any(mark in answer for mark in ("$", r"\(", r"\[", r"\boxed"))
    return answer if marked else f"${answer}$"


def _read(expression: str) -> list[Any]:
    return parse(expression, parsing_timeout=None)  # type: ignore[no-any-return]
