"""Alarms: which rules have begun to hold, told once.

Pure: `Health` is given the metrics of one update after another. An alarm is told when it starts, and again
only after it had ended. The memory is bounded, and empty after a resume. The rules are `symptoms`.
"""

from collections import deque
from typing import NamedTuple

from grpo_actors.config import Config
from grpo_actors.observe.symptoms import CONFIRMING_UPDATES, RULES, Memory, Metrics, value


class Alarm(NamedTuple):
    """One rule that has begun to hold."""

    name: str
    text: str


class Health:
    """The rules on one run."""

    def __init__(self, config: Config) -> None:
        """`config`: of the run, with `reward.functions` resolved."""
        # One more than a rule waits for: a count, such as that of skipped steps, is compared with the one before.
        longest = max(config.health.patience_updates, CONFIRMING_UPDATES) + 1
        self._memory = Memory(config, deque(maxlen=longest), [])
        self._raised: set[str] = set()

    def heed(self, metrics: Metrics) -> list[Alarm]:
        """Take in one update; returns the alarms that start with it."""
        memory = self._memory
        memory.updates.append(metrics)
        if len(memory.first_lengths) < memory.config.health.patience_updates:
            memory.first_lengths.append(value(metrics, "completion_length_mean"))
        found = {name: text for name, rule in RULES.items() if (text := rule(memory))}
        new = [Alarm(name, text) for name, text in found.items() if name not in self._raised]
        self._raised = set(found)
        return new
