"""The rewards that optional libraries compute, by their names in a configuration.

The table gives the location of each reward and the extra that installs its library; nothing is imported here. The
rewards run in the process of a user's own rewards (`own.functions`), because a library may hang on a model's text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class LibraryReward:
    """One reward, with the library that it needs."""

    #: ``module:function``, as for a user's own reward.
    spec: str
    #: Name to import, name of the package to install, and the extra that installs it.
    module: str
    package: str
    extra: str

    @property
    def cure(self) -> str:
        """Return the end of the error line for a missing library."""
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
    """Return whether the library of a reward can be imported."""
    return find_spec(LIBRARY_REWARDS[name].module) is not None
