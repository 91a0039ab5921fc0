"""Which groups the page shows: bounds on the update, and on reward and length of a completion. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from grpo_actors.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """Inclusive bounds; a group matches if one of its completions is within those of reward and length at once."""

    update_min: float = -math.inf
    update_max: float = math.inf
    reward_min: float = -math.inf
    reward_max: float = math.inf
    length_min: float = -math.inf
    length_max: float = math.inf

    @classmethod
    def parse(cls, words: Mapping[str, str]) -> "SampleFilter":
        """Read the bounds from the words of an address; a missing or empty one does not bound.

        Raises:
            ConfigError: one is not a number.
        """
        given = {field.name: words[field.name] for field in fields(cls) if words.get(field.name)}
        try:
            return cls(**{name: float(word) for name, word in given.items()})
        except ValueError as error:
            raise ConfigError(f"a filter's bound must be a number: {error}") from error

    def allows_update(self, update: float) -> bool:
        """Return whether groups of this update are shown."""
        return self.update_min <= update <= self.update_max

    def allows(self, reward: float | None, length: float) -> bool:
        """Return whether a completion is within the bounds; one without a reward only if nothing bounds rewards."""
        if reward is None:
            rewarded = math.isinf(self.reward_min) and math.isinf(self.reward_max)
        else:
            rewarded = self.reward_min <= reward <= self.reward_max
        return rewarded and self.length_min <= length <= self.length_max

    def matches(self, update: float, rewards: Sequence[float | None], lengths: Sequence[float]) -> bool:
        """Return whether a group is shown."""
        return self.allows_update(update) and any(map(self.allows, rewards, lengths))
