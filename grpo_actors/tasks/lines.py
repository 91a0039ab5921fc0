"""Read files of lines, mostly JSON Lines; an error on a line names its location, the rule and the cure.

This module handles the file format only; a task gives the columns their meaning.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from grpo_actors.errors import DataError

#: A longer line is rejected before it fills the memory: a file without line breaks is one line.
MAX_LINE_BYTES = 64 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(
    path: Path, *, setting: str = "data.path", example: str = '{"question": …, "answer": …}'
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row of the file with its line number, from 1. Blank lines are skipped.

    Args:
        path: The file.
        setting: Setting that names the file, for errors.
        example: A valid row, for errors.

    Raises:
        DataError: A line is not a JSON object in UTF-8; the message names file and line.
    """
    for number, line in read_lines(path, setting=setting):
        row = _json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number}: must be a JSON object with named columns, got {excerpt(row)}; write {example}"
            )
        yield number, row


def read_lines(path: Path, *, setting: str) -> Iterator[tuple[int, str]]:
    """Yield every line of the file that is not blank, stripped, with its number, from 1.

    Raises:
        DataError: A line is too long or not UTF-8; the message names file and line.
    """
    try:
        with path.open("rb") as file:
            # Read bytes and not text, so that the line number of invalid UTF-8 is known and only \n ends a line.
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: a line may have {MAX_LINE_BYTES:,} bytes, got more; is this a file of lines?"
                    )
                stripped = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).strip()
                if stripped:
                    yield number, _decoded(stripped, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check {setting}") from error


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: must be UTF-8, got byte 0x{line[error.start]:02x} at position {error.start}; "
            "convert the file"
        ) from None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # deeply nested brackets raise RecursionError
        raise DataError(
            f"{where}: must be one JSON object ({error}), got {excerpt(line)}; mend or delete the line"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.20} is beyond a float")
    return value


def excerpt(value: object) -> str:
    """Return the repr of a value, cut to fit into the one line of an error."""
    shown = repr(value if not isinstance(value, str) else value[:100])
    return shown if len(shown) <= 80 else f"{shown[:79]}…"
