"""Finding the answer in a completion, and comparing it as a number."""

import re


def extract_answer(text: str) -> str:
    """The content of the last ``<answer>…</answer>``; empty where there is none."""
    found = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return found[-1].strip() if found else ""


def same_answer(given: str, true: str) -> bool:
    """Whether both are the same number: 1,000 = 1000 = 1000.0."""
    try:
        return float(given.replace(",", "")) == float(true.replace(",", ""))
    except ValueError:
        return given.strip() == true.strip() != ""
