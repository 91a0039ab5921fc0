"""The two kinds of function that a user may write: both sides of the child's socket go by these rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_actors.tasks.environments import checked_reply
from grpo_actors.tasks.rewards import checked_values


@dataclass(frozen=True, slots=True)
class Kind:
    """What is asked of a function."""

    #: The setting that names it.
    setting: str
    #: The argument that it has to take, and how its signature is written.
    argument: str
    signature: str
    #: What it returned, and its arguments -> the same in JSON's types; RewardError where it is something else.
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
    """Whether a name in the settings is that of a user's own function: ``file.py:function``, ``module:function``."""
    return ":" in name or name.endswith(".py")
