"""Which groups teach something: the verdict on one group, from two facts about its content.

Knows neither rewards nor texts: whoever accepts a group finds the facts. What becomes of a group with a flaw
is the lease table's decision.
"""

from dataclasses import dataclass
from typing import Literal

#: Why a group teaches nothing, as it is counted in the metrics; "": it does teach.
Flaw = Literal["", "no_signal", "too_hard", "too_easy"]


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What the schedule knows of a group's content."""

    #: Share of right completions, 0 to 1; None: nobody needs it.
    success: float | None = None
    flaw: Flaw = ""


#: Of a group that nobody asked about: it trains.
NOT_FILTERED = FilterResult()


@dataclass(frozen=True, slots=True)
class GroupCriteria:
    """Section [selection], as far as it judges groups."""

    #: Refuse groups without a signal. DAPO, 2503.14476, section 3.2.
    dynamic_sampling: bool
    #: The share of right completions lies in [min_success, max_success].
    min_success: float
    max_success: float

    def filter_group(self, success: float, *, signal: bool) -> FilterResult:
        """The verdict on a group.

        Args:
            success: Share of right completions, 0 to 1.
            signal: Whether any of its completions that trains has an advantage other than 0.
        """
        if success < self.min_success:
            return FilterResult(success, "too_hard")
        if success > self.max_success:
            return FilterResult(success, "too_easy")
        return FilterResult(success, "no_signal" if self.dynamic_sampling and not signal else "")
