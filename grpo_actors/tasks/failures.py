"""Report rewards that fail: each kind of failure once, however many groups have it.

A failure is the text of a RewardError: the reason in one line, then perhaps a traceback. An environment fails in the same
way and is listed among the rewards, as `ENVIRONMENT`.
"""

import re
from collections.abc import Iterator, Mapping

ENVIRONMENT = "environment"

#: Last lines of a traceback that are reported: usually the line of the user's code, and the error.
TRACEBACK_LINES = 4
#: Characters kept of a report.
MAX_CHARACTERS = 600
#: Kinds that are reported; a worker of somebody else may invent any number.
MAX_KINDS = 100


class Failures:
    """The kinds of failure that were reported."""

    def __init__(self) -> None:
        self._reported: set[tuple[str, str]] = set()

    def new(self, problem_id: str, failures: Mapping[str, str]) -> Iterator[str]:
        """Yield a text for each failure of a kind that was not reported yet; `failures`: reward -> failure."""
        for name, failure in failures.items():
            kind = (name, _kind(failure))
            if kind not in self._reported and len(self._reported) < MAX_KINDS:
                self._reported.add(kind)
                function = name if name == ENVIRONMENT else f"reward {name}"
                yield f"{function}, problem {problem_id}: {summary(failure)}"


def summary(failure: str) -> str:
    """Return the reason of a failure and the last lines of its traceback."""
    reason, *traceback = failure.splitlines()
    return "\n".join([reason, *traceback[-TRACEBACK_LINES:]])[:MAX_CHARACTERS]


def _kind(failure: str) -> str:
    """Return the part of the reason without values: the type of an exception, the rule that was broken."""
    return re.split(r"[:(,]", re.sub(r"\d+", "", failure.partition("\n")[0][:100]))[0]
