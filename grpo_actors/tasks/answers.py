"""The answer format: request it, find the answer in a completion, and compare it with the true one.

A completion gives its reasoning and then the answer, each between its own tags. This module does not depend on a
data set or a reward. Every function is linear in the length of the text for any input, because completions are
unchecked.
"""

import re
from decimal import Decimal

#: System prompt of tasks whose completions should have the format.
FORMAT_REQUEST = (
    "Work the problem out step by step, then give the answer alone, without units or explanation. "
    "Write exactly this and nothing after it:\n"
    "<reasoning>\nyour steps\n</reasoning>\n"
    "<answer>\nthe answer\n</answer>"
)

# No tag may be inside, so that an opening tag without its closing tag never swallows a later complete answer.
_WHOLE_ANSWER = re.compile(r"<answer>([^<]*+(?:<(?!/?answer>)[^<]*+)*+)</answer>")
_NUMBER = re.compile(r"(?:[+-]?\$?|\$[+-])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?")
_DIGIT = re.compile(r"[0-9]")
_DECORATION = str.maketrans("", "", "$,")

#: A longer run of digits is compared as text, because parsing it takes time quadratic in its length.
MAX_DIGITS = 1000


def extract_answer(text: str) -> str:
    """Return the content of the last complete ``<answer>…</answer>``, stripped; empty if there is none."""
    found = _WHOLE_ANSWER.findall(text)
    return found[-1].strip() if found else ""


def same_answer(given: str, true: str) -> bool:
    """Return whether two answers agree: as numbers (1,000 = 1000 = 1000.0 = $1000), else as stripped text.

    An empty answer agrees with nothing: a completion without an answer is never right.
    """
    given, true = given.strip(), true.strip()
    if not given or not true:
        return False
    given_number, true_number = read_number(given), read_number(true)
    if given_number is None or true_number is None:
        return given == true
    return given_number == true_number


def canonical_answer(text: str) -> str:
    """Return the one text for all answers that are the `same_answer`: 1,000.0 and $1000 become 1000."""
    text = text.strip()
    number = read_number(text)
    if number is None:
        return text
    # Not Decimal.normalize, which rounds to the 28 digits of decimal's context.
    digits = f"{number:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if number == 0 else digits


def read_number(text: str) -> Decimal | None:
    """Return the exact number that the text is; None if it is no number or longer than `MAX_DIGITS`.

    A sign, a dollar sign, well-placed thousands commas and a final full stop are allowed; units and
    exponents are not.
    """
    text = text.strip()
    # Both halves of the pattern are optional, so it also matches a sign or a point alone: require a digit.
    if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text) or not _DIGIT.search(text):
        return None
    return Decimal(text.translate(_DECORATION))


def gsm8k_answer(solution: str) -> str:
    """Return the final answer of a worked GSM8K solution: the text after ``####``; empty if that is missing."""
    return solution.rpartition("####")[2].strip() if "####" in solution else ""
