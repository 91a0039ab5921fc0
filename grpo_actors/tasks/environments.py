"""What an environment is, and the built-in one.

An environment is a function that is asked at the end of each turn of a completion, by keyword:

    environment(messages, answer, **columns) -> the next message, or None: the completion ends

``messages`` is the whole chat so far: the prompt's turns, then the policy's and the replies between them, the
turn that has just ended last. ``answer`` is the true answer, and every further column of the data set comes by its
name. The message is a text, which becomes a turn of the user's, or a turn ``{"role": …, "content": …}`` of a role that
the model's chat template knows.

It must be a function of its arguments and nothing else: a lease that is given out again, or a run that is resumed, has
to give the same completions. What it would remember it can read in ``messages``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from grpo_actors.errors import RewardError, nearest
from grpo_actors.tasks.calculator import calculator
from grpo_actors.tasks.task import Message


class Environment(Protocol):
    """A built-in environment, or a user's own."""

    def __call__(self, messages: Sequence[Message], answer: str, **columns: Any) -> str | Message | None:
        """The next message, or None where there is no more to say."""
        ...


#: Every built-in environment by the name that a configuration uses.
ENVIRONMENTS: Mapping[str, Environment] = {"calculator": calculator}


def built_in(name: str) -> Environment:
    """The built-in environment of that name; RewardError, with the nearest name, where there is none."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    cure = nearest(name, ENVIRONMENTS, show=repr, otherwise=f"; known: {', '.join(ENVIRONMENTS)}")
    raise RewardError(
        f"data.environment: {name!r} is not a built-in environment{cure} "
        '(an own one is written "file.py:function" or "module:function")'
    )


def checked_reply(reply: object) -> Message | None:
    """What an environment returned, as a message; RewardError says what is wrong with it."""
    if reply is None:
        return None
    if isinstance(reply, str):
        return {"role": "user", "content": reply}
    if not isinstance(reply, dict) or reply.keys() != {"role", "content"}:
        raise RewardError(f"must return a text, a turn with role and content, or None, got {reply!r:.60}")
    if not all(isinstance(value, str) for value in reply.values()):
        raise RewardError(f"role and content of a turn must be texts, got {reply!r:.60}")
    return dict(reply)
