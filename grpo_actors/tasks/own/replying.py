"""The environment of a run, ready to reply to the turns of completions.

Built-in ones run here; a user's own runs in a child process that can be killed, as own rewards do.
"""

from typing import Any

from grpo_actors.tasks.environments import Environment, built_in, checked_reply
from grpo_actors.tasks.own.functions import OwnFunctions, UsesOwnFunctions
from grpo_actors.tasks.own.kinds import is_own
from grpo_actors.tasks.task import Message, Problem


class Replier(UsesOwnFunctions):
    """The environment `name`, which has `timeout_s` for a turn. Not safe to share among threads.

    Raises RewardError where the name is unknown or the function cannot be loaded. Close it after use.
    """

    def __init__(self, name: str, *, timeout_s: float) -> None:
        self.name = name
        self._built_in: Environment | None = None if is_own(name) else built_in(name)
        self._own = OwnFunctions([name], "environment", timeout_s=timeout_s) if is_own(name) else None

    def reply(self, problem: Problem, messages: list[Message]) -> Message | None:
        """What follows the last of `messages`, which are the whole chat; None: nothing. RewardError: it failed."""
        # Last, so that a column called "answer" or "messages" cannot take the place of the real one.
        arguments: dict[str, Any] = {**problem.columns, "messages": messages, "answer": problem.answer}
        if self._own is not None:
            reply: Message | None = self._own.call(0, arguments)
            return reply
        assert self._built_in is not None
        return checked_reply(self._built_in(**arguments))
