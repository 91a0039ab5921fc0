"""The answer format: asking for it, finding the answer in a completion, comparing it with the true one.

Completions give their reasoning and then the answer, each between tags of its own. This module knows
no data set and no reward. Every function here is linear in the length of the text, whatever a model
writes: completions are unchecked input.
"""

import re
from decimal import Decimal

#: The system prompt of tasks whose completions are to have the format.
FORMAT_REQUEST = (
    "Work the problem out step by step, then give the answer alone, without units or explanation. "
    "Write exactly this and nothing after it:\n"
    "<reasoning>\nyour steps\n</reasoning>\n"
    "<answer>\nthe answer\n</answer>"
)

# No tag may lie inside: so an opening tag without its closing one never swallows a later, whole answer.
_WHOLE_ANSWER = re.compile(r"<answer>([^<]*+(?:<(?!/?answer>)[^<]*+)*+)</answer>")
_NUMBER = re.compile(r"(?:[+-]?\$?|\$[+-])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?")
_DIGIT = re.compile(r"[0-9]")
_DECORATION = str.maketrans("", "", "$,")

#: A longer run of digits is compared as text: reading it would take time quadratic in its length.
MAX_DIGITS = 1000


def extract_answer(text: str) -> str:
    """The content of the last complete ``<answer>…</answer>``, stripped; empty where there is none."""
    found = _WHOLE_ANSWER.findall(text)
    return found[-1].strip() if found else ""


def same_answer(given: str, true: str) -> bool:
    """Whether two answers agree: as numbers (1,000 = 1000 = 1000.0 = $1000), else as stripped text.

    An empty answer agrees with nothing: a completion that answers nothing is never right.
    """
    given, true = given.strip(), true.strip()
    if not given or not true:
        return False
    given_number, true_number = read_number(given), read_number(true)
    if given_number is None or true_number is None:
        return given == true
    return given_number == true_number


def canonical_answer(text: str) -> str:
    """The one text that stands for all answers that are the `same_answer`: 1,000.0 and $1000 are 1000."""
    text = text.strip()
    number = read_number(text)
    if number is None:
        return text
    # Not Decimal.normalize, which rounds to the 28 digits of decimal's context.
    digits = f"{number:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if number == 0 else digits


def read_number(text: str) -> Decimal | None:
    """The number that the text is, exactly; None where it is anything else or has over `MAX_DIGITS`.

    A sign, a dollar sign, well-placed thousands commas and a final full stop are allowed, units and
    exponents are not.
    """
    text = text.strip()
    # Both halves of the pattern are optional, so that it also fits a lone sign or point.
    if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text) or not _DIGIT.search(text):
        return None
    return Decimal(text.translate(_DECORATION))


def gsm8k_answer(solution: str) -> str:
    """The final answer of a worked GSM8K solution: what follows ``####``; empty where that is missing."""
    return solution.rpartition("####")[2].strip() if "####" in solution else ""
