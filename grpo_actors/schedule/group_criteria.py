"""Decide whether a group teaches something, from two facts about its content.

Does not depend on rewards or texts: the code that accepts a group computes the facts. The lease table decides
what happens to a group with a flaw.
"""

from dataclasses import dataclass
from typing import Literal

#: Why a group teaches nothing, under the name that the metrics use; "" if it does teach something.
Flaw = Literal["", "no_signal", "too_hard", "too_easy"]


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The content of a group, as far as the schedule needs it."""

    #: Share of right completions, 0 to 1; None if no setting needs it.
    success: float | None = None
    flaw: Flaw = ""


#: The result for a group that was not checked: it trains.
NOT_FILTERED = FilterResult()


@dataclass(frozen=True, slots=True)
class GroupCriteria:
    """The criteria of section [selection] for a single group."""

    #: Whether groups without a signal have a flaw. DAPO, 2503.14476, section 3.2.
    dynamic_sampling: bool
    #: The share of right completions must lie in [min_success, max_success].
    min_success: float
    max_success: float

    def filter_group(self, success: float, *, signal: bool) -> FilterResult:
        """Return the first flaw of a group, if it has one, with its share of right completions.

        Args:
            success: Share of right completions, 0 to 1.
            signal: Whether at least one completion that trains has an advantage other than 0.
        """
        if success < self.min_success:
            return FilterResult(success, "too_hard")
        if success > self.max_success:
            return FilterResult(success, "too_easy")
        return FilterResult(success, "no_signal" if self.dynamic_sampling and not signal else "")
