"""Read a run's JSON files strictly: each has one form, and a file of another form is refused in one line.

Users edit these files by hand, a full disk cuts them, and a run folder may come from somebody else. So every file has
one reader, which checks its form before any value of it is used. Depends on forms, not on what the files mean.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from grpo_actors.errors import RunError

T = TypeVar("T")

#: `__pydantic_config__` of the dataclasses that are forms of files: no text is read as a number, no number is NaN.
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
#: Longest reason in an error, in characters: an error is one line.
_MAX_REASON = 200


def read_json(path: Path, form: TypeAdapter[T], cure: str) -> T:
    """Return the content of a file.

    Raises:
        RunError: It cannot be read or has another form; one line that ends with the cure.
    """
    try:
        return form.validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); {cure}") from error
    except ValidationError as error:
        raise RunError(f"{path}: {reason_of(error)}; {cure}") from error


def reason_of(error: ValidationError) -> str:
    """Return the first of pydantic's errors in one line: ``cursor.position: Field required``."""
    first, *_ = error.errors()
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}"[:_MAX_REASON] if place else str(first["msg"])[:_MAX_REASON]
