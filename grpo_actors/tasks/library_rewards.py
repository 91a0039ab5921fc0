"""Rewards that an optional library computes, by the names that a configuration uses.

Knows where each is and which extra installs its library; imports none. They run where a user's own
rewards do (`own_reward`): a library that reads a model's text may hang on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class LibraryReward:
    """One reward, and what it needs."""

    #: ``module:function``, as for a user's own reward.
    spec: str
    #: What is imported, and what is installed.
    module: str
    package: str
    extra: str

    @property
    def cure(self) -> str:
        """The end of an error's line where the library is missing."""
        return f"needs the package {self.package}, which is not installed; pip install 'grpo-actors[{self.extra}]'"


LIBRARY_REWARDS: Mapping[str, LibraryReward] = {
    "math_verify": LibraryReward(
        "grpo_actors.tasks.math_reward:math_verify", "math_verify", "math-verify", "math"
    ),
    "reasoning_gym": LibraryReward(
        "grpo_actors.tasks.gym_library:reasoning_gym", "reasoning_gym", "reasoning-gym", "reasoning"
    ),
}


def is_installed(name: str) -> bool:
    """Whether the library of a reward can be imported."""
    return find_spec(LIBRARY_REWARDS[name].module) is not None
