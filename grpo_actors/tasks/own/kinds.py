"""The two kinds of function that a user may write; both sides of the child's socket use this table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from grpo_actors.tasks.environments import checked_reply
from grpo_actors.tasks.own.logs import Logs
from grpo_actors.tasks.rewards import checked_values


@dataclass(frozen=True, slots=True)
class Kind:
    """The requirements on a function, and how it is called."""

    #: Setting that names the function.
    setting: str
    #: Arguments of which the function must take one, and its whole signature for errors.
    arguments: tuple[str, ...]
    signature: str
    #: (returned value, arguments) -> the value in types of JSON; raises RewardError if the value is invalid.
    check: Callable[[object, Mapping[str, Any]], Any]
    #: Arguments that are no JSON: name -> what makes the argument, in the child, from its JSON and what the call logs.
    objects: Mapping[str, Callable[[Any, Logs], Any]]

    def complete(self, arguments: Mapping[str, Any], logs: Logs) -> dict[str, Any]:
        """Return the arguments with the objects made from their JSON; `logs` collects what the call logs."""
        made = {name: make(arguments[name], logs) for name, make in self.objects.items() if name in arguments}
        return {**arguments, **made}


#: The arguments of a reward that have a value for each completion.
COMPLETIONS = ("completions", "completion_ids")


def completion_count(arguments: Mapping[str, Any]) -> int:
    """Return the number of completions in the arguments of a call; an environment has none."""
    return next((len(arguments[name]) for name in COMPLETIONS if name in arguments), 0)


def _check_values(values: object, arguments: Mapping[str, Any]) -> list[float | None]:
    return checked_values(values, completion_count(arguments))


KINDS: Mapping[str, Kind] = {
    "reward": Kind(
        "reward.functions",
        COMPLETIONS,
        "(prompts, completions, answer, **columns)",
        _check_values,
        {
            "trainer_state": lambda fields, _: SimpleNamespace(**fields),
            "log_extra": lambda _, logs: logs.log_extra,
            "log_metric": lambda _, logs: logs.log_metric,
        },
    ),
    "environment": Kind(
        "data.environment",
        ("messages",),
        "(messages, answer, **columns)",
        lambda reply, _: checked_reply(reply),
        {},
    ),
}


def is_own(name: str) -> bool:
    """Return whether a name in the settings is a user's own function: ``file.py:function``, ``module:function``."""
    return ":" in name or name.endswith(".py")
