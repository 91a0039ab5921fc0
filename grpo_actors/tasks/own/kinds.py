"""The two kinds of function that a user may write; both sides of the child's socket use this table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_actors.tasks.environments import checked_reply
from grpo_actors.tasks.rewards import checked_values


@dataclass(frozen=True, slots=True)
class Kind:
    """The requirements on a function."""

    #: Setting that names the function.
    setting: str
    #: Argument that the function must take, and its whole signature for errors.
    argument: str
    signature: str
    #: (returned value, arguments) -> the value in types of JSON; raises RewardError if the value is invalid.
    check: Callable[[object, Mapping[str, Any]], Any]


KINDS: Mapping[str, Kind] = {
    "reward": Kind(
        "reward.functions",
        "completions",
        "(prompts, completions, answer, **columns)",
        lambda values, arguments: checked_values(values, len(arguments["completions"])),
    ),
    "environment": Kind(
        "data.environment",
        "messages",
        "(messages, answer, **columns)",
        lambda reply, _: checked_reply(reply),
    ),
}


def is_own(name: str) -> bool:
    """Return whether a name in the settings is a user's own function: ``file.py:function``, ``module:function``."""
    return ":" in name or name.endswith(".py")
