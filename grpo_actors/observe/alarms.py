"""Raise an alarm once when a rule begins to hold.

Pure: `Health` takes the metrics of one update after another. An alarm is raised when it starts, and again
only after it has ended. Its memory is bounded, and empty after a resume. The rules are in `symptoms`.
"""

from collections import deque
from typing import NamedTuple

from grpo_actors.config import Config
from grpo_actors.observe.symptoms import CONFIRMING_UPDATES, RULES, Metrics, RuleInput, value


class Alarm(NamedTuple):
    """An alarm that has just started: the rule's name and one line of text."""

    name: str
    text: str


class Health:
    """The alarm state of one run."""

    def __init__(self, config: Config, *, ends_turns: bool = True) -> None:
        """Start with no alarms.

        Args:
            config: The run's settings, with `reward.functions` resolved.
            ends_turns: Whether the model's chat template ends a turn with a token that ends a completion.
        """
        # One more than a rule waits for: a running count, such as skipped steps, is compared with an earlier one.
        longest = max(config.health.patience_updates, CONFIRMING_UPDATES) + 1
        self._rule_input = RuleInput(config, deque(maxlen=longest), [], ends_turns)
        self._raised: set[str] = set()

    def check(self, metrics: Metrics) -> list[Alarm]:
        """Add the metrics of one update and return the alarms that start with it."""
        memory = self._rule_input
        memory.updates.append(metrics)
        if len(memory.first_lengths) < memory.config.health.patience_updates:
            memory.first_lengths.append(value(metrics, "completion_length_mean"))
        found = {name: text for name, rule in RULES.items() if (text := rule(memory))}
        new = [Alarm(name, text) for name, text in found.items() if name not in self._raised]
        self._raised = set(found)
        return new
