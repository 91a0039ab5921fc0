"""Section [selection] at work: filters groups, skips problems, counts both, and raises an alarm at the refill limit.

`schedule` decides what happens to a lease; `learner.group_filter` extracts the facts of a group. No socket.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from grpo_actors.learner.groups import SampledGroup
from grpo_actors.schedule.curriculum import Curriculum
from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult
from grpo_actors.schedule.lease import Consumption, Settled
from grpo_actors.tasks.task import Problem

#: A mean share of right completions below FEW is reported as none right, one above 1 − FEW as all right.
FEW = 0.05


@dataclass
class Selection:
    """The selection of one run."""

    #: Position in the order -> (epoch, problem).
    problem: Callable[[int], tuple[int, Problem]]
    #: Returns the filter result of a group; None: all groups train.
    group_filter: Callable[[SampledGroup], FilterResult] | None = None
    #: Chooses the problems to pose; None: all problems are posed.
    curriculum: Curriculum | None = None
    #: Alarm text if the last update hit `refill_limit`; None if not, or if already reported.
    alarm: str | None = field(init=False, default=None)
    _last_consumption: Consumption = field(init=False, default=Consumption())
    _at_limit: bool = field(init=False, default=False)

    def skips(self, position: int) -> bool:
        """Return whether the curriculum skips the problem at a position, by its success rate up to the last update."""
        if self.curriculum is None:
            return False
        epoch, problem = self.problem(position)
        return not self.curriculum.poses(epoch, problem.id)

    def filter_group(self, group: SampledGroup) -> FilterResult:
        """Return the filter result of a group, for the schedule."""
        return NOT_FILTERED if self.group_filter is None else self.group_filter(group)

    def settle(self, consumption: Consumption) -> str | None:
        """Learn from an update; return an alarm text if it hit `refill_limit` and the update before it did not."""
        self._last_consumption = consumption
        for settled in consumption.settled:
            if self.curriculum is not None and settled.filter_result.success is not None:
                _, problem = self.problem(settled.position)
                self.curriculum.record(problem.id, settled.filter_result.success)
        flawed = [settled for settled in consumption.settled if settled.filter_result.flaw]
        before, self._at_limit = self._at_limit, any(settled.trained for settled in flawed)
        self.alarm = _alarm_text(flawed) if self._at_limit and not before else None
        return self.alarm

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of the last update; a value is None if its feature (filter, curriculum) is off."""
        flaws = Counter(s.filter_result.flaw for s in self._last_consumption.settled if not s.trained)
        return {
            "groups_passed_over": None if self.group_filter is None else dict(sorted(flaws.items())),
            "groups_resampled": self._last_consumption.outdated,
            "problems_skipped": None if self.curriculum is None else self._last_consumption.skipped,
        }

    def success_rates(self) -> Mapping[str, float]:
        """Return {problem id: success rate}, for a checkpoint."""
        return {} if self.curriculum is None else dict(self.curriculum.rates)


def _alarm_text(flawed: Sequence[Settled]) -> str:
    passed_over = sum(not settled.trained for settled in flawed)
    return (
        f"{passed_over} groups were passed over for one update (selection.refill_limit), and flawed ones now "
        f"train as they are; {likely_cause([settled.filter_result for settled in flawed])}"
    )


def likely_cause(flawed: Sequence[FilterResult]) -> str:
    """Return why so many groups teach nothing, judging by their shares of right completions."""
    shares = [filter_result.success or 0.0 for filter_result in flawed]
    if fmean(shares) < FEW:
        return "no completion is right: too hard for this model, cut by rollout.max_new_tokens, or in another form"
    if fmean(shares) > 1 - FEW:
        return "all completions are right: the problems are too easy, or learnt"
    mixed = [
        0 < share < 1 and result.flaw == "no_signal" for share, result in zip(shares, flawed, strict=True)
    ]
    if any(mixed):
        return "right and wrong completions are worth the same: see reward.functions"
    return "problems are solved nearly always or nearly never: see rollout.num_generations and selection.min_success"
