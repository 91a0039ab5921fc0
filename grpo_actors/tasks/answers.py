r"""The answer format: request it, find the answer in a completion, and compare it with the true one.

A completion gives its reasoning and then the answer, each between its own tags. Where the answer is mathematics, other ways
to write it count too: ``\boxed{42}`` or ``**42**`` instead of tags, and a unit, a currency or thousands separators around
the number. This module does not depend on a data set or a reward. Every function is linear in the length of the text for
any input, because completions are unchecked.
"""

import re
from decimal import Decimal
from typing import NamedTuple

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
# One pair of braces may be inside, as in \boxed{\frac{1}{2}}.
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+)\}")
_BOLD = re.compile(r"\*\*([^*\n]{1,100})\*\*")
# LaTeX around a number: a word as text, a space, an escaped sign.
_WORD_IN_LATEX = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACE_IN_LATEX = re.compile(r"\\[,;:! ]|\{,\}|~")
_LEAD = re.compile(r"^[^\d=:]*[=:]\s*")  # "x = ", "Answer: "
_QUANTITY = re.compile(
    r"(?P<sign>[+-]?)\s?[$€£]?\s?"
    r"(?P<number>(?:[0-9]{1,3}(?P<mark>[,'\s])[0-9]{3}(?:(?P=mark)[0-9]{3})*|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"\s?(?P<unit>%|°?[^\W\d_]{0,20}(?:[ /][^\W\d_]{1,20}){0,2}(?:\^?[23]|[²³])?)\s?[.!]?"
)
#: Bold passages that are tried, from the last one back.
MAX_BOLD = 100
#: Words after a number that multiply it, and letters that may be a variable; a number with one of these is none.
_NO_UNITS = re.compile(
    r"(?i)(?<!°)\b(?:hundred|thousand|million|billion|trillion|dozen|score|or|[a-c]|[knp-rx-z])\b"
)

#: A longer run of digits is compared as text, because parsing it takes time quadratic in its length.
MAX_DIGITS = 1000


class Found(NamedTuple):
    """An answer in a completion, and what found it."""

    text: str
    #: "tags", "boxed" or "bold"; empty if there is no answer.
    parser: str


def find_answer(text: str, *, mathematics: bool = False) -> Found:
    r"""Return the last complete ``<answer>…</answer>``.

    In mathematics, without one, the last ``\boxed{…}`` counts, and without that the last number in ``**…**``.
    """
    if answer := extract_answer(text):
        return Found(answer, "tags")
    if not mathematics:
        return Found("", "")
    if boxed := [content.strip() for content in _BOXED.findall(text) if content.strip()]:
        return Found(boxed[-1], "boxed")
    bold = (
        content for content in _BOLD.findall(text)[: -MAX_BOLD - 1 : -1] if read_quantity(content) is not None
    )
    number = next(bold, None)
    return Found("", "") if number is None else Found(number.strip(), "bold")


def extract_answer(text: str) -> str:
    """Return the content of the last complete ``<answer>…</answer>``, stripped; empty if there is none."""
    found = _WHOLE_ANSWER.findall(text)
    return found[-1].strip() if found else ""


def same_answer(given: str, true: str, *, mathematics: bool = False) -> bool:
    """Return whether two answers agree: as numbers (1,000 = 1000 = 1000.0 = $1000), else as stripped text.

    In mathematics, a unit or LaTeX around a number does not count (`read_quantity`). An empty answer agrees with nothing:
    a completion without an answer is never right.
    """
    given, true = given.strip(), true.strip()
    if not given or not true:
        return False
    read = read_quantity if mathematics else read_number
    given_number, true_number = read(given), read(true)
    if given_number is None or true_number is None:
        return given == true
    return given_number == true_number


def canonical_answer(text: str, *, mathematics: bool = False) -> str:
    """Return the one text for all answers that are the `same_answer`: 1,000.0 and $1000 become 1000."""
    text = text.strip()
    number = read_quantity(text) if mathematics else read_number(text)
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


def read_quantity(text: str) -> Decimal | None:
    r"""Return the exact number of a quantity: 42 km, 1 000 m², €5, 12 %, ``x = 42``, ``\boxed{1{,}234\text{ apples}}``.

    Return None if the text is no number with at most three words as its unit. The unit is ignored, and 50 % is 50.
    """
    if len(text) > MAX_DIGITS:
        return None
    text = text.strip().strip("*$").strip()
    if boxed := _BOXED.fullmatch(text):
        text = boxed[1]
    text = (
        text.removeprefix(r"\(")
        .removesuffix(r"\)")
        .replace(r"\$", "$")
        .replace(r"\%", "%")
        .replace("{,}", ",")
        .replace(r"^\circ", "°")
    )
    text = _SPACE_IN_LATEX.sub(" ", _WORD_IN_LATEX.sub(r" \1", text)).replace("−", "-")
    text = _LEAD.sub("", " ".join(text.split())).strip("*$ ")
    number = read_number(text)
    if number is not None:
        return number
    quantity = _QUANTITY.fullmatch(text)
    if quantity is None or _NO_UNITS.search(quantity["unit"]):
        return None
    digits = re.sub(r"[,'\s]", "", quantity["number"])
    return Decimal(quantity["sign"] + digits)


def gsm8k_answer(solution: str) -> str:
    """Return the final answer of a worked GSM8K solution: the text after ``####``; empty if that is missing."""
    return solution.rpartition("####")[2].strip() if "####" in solution else ""
