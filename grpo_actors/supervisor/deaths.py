"""Count the deaths of one child that have the same cause. Knows no process and no clock."""

import re
from dataclasses import dataclass

#: Deaths in a row at the same work and with the same error after which that work is given up.
MAX_DEATHS = 3
#: Starts in a row that end before the child works, for whatever reasons, after which the child is given up.
MAX_STARTS = 5
#: What differs between two texts of the same error: counts and addresses.
_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")


@dataclass
class Deaths:
    """The last deaths of one child."""

    #: Work, end and error of the last death, and how often in a row it happened.
    _last: tuple[str, str, str] = ("", "", "")
    _count: int = 0
    #: How many starts in a row came to nothing.
    _failed_starts: int = 0

    def repeat_start(self, *, worked: bool, killed: bool) -> bool:
        """Note a death; return whether it was the last of MAX_STARTS before which the child had not begun its work.

        Args:
            worked: Whether it had.
            killed: As for `repeat`.
        """
        if worked:
            self._failed_starts = 0
        elif not killed:
            self._failed_starts += 1
        return self._failed_starts >= MAX_STARTS

    def repeat(self, work: str, how: str, error: str, *, killed: bool) -> bool:
        """Note a death; return whether it was the last of MAX_DEATHS with the same cause.

        Args:
            work: Name of the work at which the child died; empty: it had none, as while it starts.
            how: How it ended.
            error: The last line that it printed; empty if that line is no error.
            killed: Whether a signal ended it that no error of its own sends. Without work, such a death proves nothing.
        """
        death = (work, how, _NUMBERS.sub("#", error))
        self._count = self._count + 1 if death == self._last else 1
        self._last = death
        return self._count >= MAX_DEATHS and (bool(work) or not killed)
