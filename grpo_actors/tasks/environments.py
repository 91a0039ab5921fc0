"""The interface of environments, and the built-in ones.

An environment is a function that is called with keywords at the end of each turn of a completion:

    environment(messages, answer, **columns) -> the next message, or None to end the completion

``messages`` is the whole chat so far: the turns of the prompt, then the turns of the policy with the replies between
them. The turn that has just ended is the last. ``answer`` is the true answer, and every column of the data set is
passed under its name, with its type. The message is a text, which becomes a turn of the user, or a turn
``{"role": …, "content": …}`` with a role of the model's chat template.

An environment must depend on its arguments only: a lease that is granted again, or a run that is resumed, has to give
the same completions. It needs no memory, because ``messages`` has the whole chat.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from grpo_actors.errors import RewardError, nearest
from grpo_actors.tasks.calculator import calculator
from grpo_actors.tasks.task import Message


class Environment(Protocol):
    """A built-in environment, or a user's own."""

    def __call__(self, messages: Sequence[Message], answer: str, **columns: Any) -> str | Message | None:
        """Return the next message, or None to end the completion."""
        ...


#: The built-in environments by their names in a configuration.
ENVIRONMENTS: Mapping[str, Environment] = {"calculator": calculator}


def built_in(name: str) -> Environment:
    """Return the built-in environment of that name; raise RewardError with the nearest name if there is none."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    cure = nearest(name, ENVIRONMENTS, show=repr, otherwise=f"; known: {', '.join(ENVIRONMENTS)}")
    raise RewardError(
        f"data.environment: {name!r} is not a built-in environment{cure} "
        '(an own one is written "file.py:function" or "module:function")'
    )


def checked_reply(reply: object) -> Message | None:
    """Return the reply of an environment as a message; raise RewardError with the reason if it is none."""
    if reply is None:
        return None
    if isinstance(reply, str):
        return {"role": "user", "content": reply}
    if not isinstance(reply, dict) or reply.keys() != {"role", "content"}:
        raise RewardError(f"must return a text, a turn with role and content, or None, got {reply!r:.60}")
    if not all(isinstance(value, str) for value in reply.values()):
        raise RewardError(f"role and content of a turn must be texts, got {reply!r:.60}")
    return dict(reply)
