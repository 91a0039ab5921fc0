"""What section [selection] does in a run: appraises groups, holds problems back, counts, and says if it is in vain.

What becomes of a lease is decided by `schedule`; which facts of a group matter is told by the learner. No socket.
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

#: Below this share of right completions none is said to be right, above one minus it all.
FEW = 0.05


@dataclass
class Selection:
    """The selection of one run."""

    #: (epoch, problem) at a position of the order.
    problem: Callable[[int], tuple[int, Problem]]
    #: None: all groups train.
    group_filter: Callable[[SampledGroup], FilterResult] | None = None
    #: None: all problems are posed.
    curriculum: Curriculum | None = None
    #: That the last update's refills were in vain, and why; None: they were not, or that was told before.
    alarm: str | None = field(init=False, default=None)
    _last: Consumption = field(init=False, default=Consumption())
    _in_vain: bool = field(init=False, default=False)

    def skips(self, position: int) -> bool:
        """Whether the problem at a position is not posed, by what is known after the last update."""
        if self.curriculum is None:
            return False
        epoch, problem = self.problem(position)
        return not self.curriculum.poses(epoch, problem.id)

    def filter_group(self, group: SampledGroup) -> FilterResult:
        """What the schedule must know of a group."""
        return NOT_FILTERED if self.group_filter is None else self.group_filter(group)

    def settle(self, consumption: Consumption) -> str | None:
        """Learn from an update; returns the text of an alarm if its refills came to their limit, once in a row."""
        self._last = consumption
        for settled in consumption.settled:
            if self.curriculum is not None and settled.filter_result.success is not None:
                _, problem = self.problem(settled.position)
                self.curriculum.record(problem.id, settled.filter_result.success)
        flawed = [settled for settled in consumption.settled if settled.filter_result.flaw]
        before, self._in_vain = self._in_vain, any(settled.trained for settled in flawed)
        self.alarm = _alarm_text(flawed) if self._in_vain and not before else None
        return self.alarm

    def metrics(self) -> dict[str, Any]:
        """Of the last update; None where no group is looked at, or no problem held back."""
        flaws = Counter(s.filter_result.flaw for s in self._last.settled if not s.trained)
        return {
            "groups_passed_over": None if self.group_filter is None else dict(sorted(flaws.items())),
            "groups_resampled": self._last.outdated,
            "problems_skipped": None if self.curriculum is None else self._last.skipped,
        }

    def success_rates(self) -> Mapping[str, float]:
        """Problem id -> success rate, as a checkpoint keeps them."""
        return {} if self.curriculum is None else dict(self.curriculum.rates)


def _alarm_text(flawed: Sequence[Settled]) -> str:
    passed_over = sum(not settled.trained for settled in flawed)
    return (
        f"{passed_over} groups were passed over for one update (selection.refill_limit), and flawed ones now "
        f"train as they are; {likely_cause([settled.filter_result for settled in flawed])}"
    )


def likely_cause(flawed: Sequence[FilterResult]) -> str:
    """Why so many groups teach nothing, from their shares of right completions."""
    shares = [filter_result.success or 0.0 for filter_result in flawed]
    if fmean(shares) < FEW:
        return "no completion is right: too hard for this model, cut by rollout.max_new_tokens, or in another form"
    if fmean(shares) > 1 - FEW:
        return "all completions are right: the problems are too easy, or learnt"
    mixed = [0 < share < 1 and a.flaw == "no_signal" for share, a in zip(shares, flawed, strict=True)]
    if any(mixed):
        return "right and wrong completions are worth the same: see reward.functions"
    return "problems are solved nearly always or nearly never: see rollout.num_generations and selection.min_success"
