"""End a run whose reward fails on everything: going on would train on the other rewards alone, and say nothing."""

from collections.abc import Mapping, Sequence

from grpo_actors.learner.groups import SampledGroup

#: Name of the alarm that ends the run.
ALWAYS_FAILS = "reward always fails"
#: Updates in a row in which a reward fails for every completion, before the run ends.
UPDATES = 3


class FailingRewards:
    """For each reward with a weight, the number of updates in a row in which it failed for every completion."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._in_a_row = {name: 0 for name, weight in weights.items() if weight}

    def check(self, groups: Sequence[SampledGroup]) -> str | None:
        """Count one update with these groups; return why the run must end, or None."""
        for name, count in self._in_a_row.items():
            failed = all(name in group.failures for group in groups)
            self._in_a_row[name] = count + 1 if failed else 0
        for name, count in self._in_a_row.items():
            if count >= UPDATES:
                return f"{name} failed for every completion of {UPDATES} updates: {groups[-1].failures[name]}"
        return None
