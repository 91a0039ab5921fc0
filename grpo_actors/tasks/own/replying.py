"""Reply to the turns of completions with the environment of a run.

Built-in environments run here; a user's own runs in a child process that can be killed, like own rewards.
"""

from collections.abc import Collection
from typing import Any

from grpo_actors.tasks.columns import check_columns
from grpo_actors.tasks.environments import Environment, built_in, checked_reply
from grpo_actors.tasks.own.functions import OwnFunctions, UsesOwnFunctions
from grpo_actors.tasks.own.kinds import is_own
from grpo_actors.tasks.task import Message, Problem, Task


class Replier(UsesOwnFunctions):
    """The environment `name`, with `timeout_s` for each turn of an own one. Close it after use.

    Raises RewardError if the name is unknown or the function cannot be loaded. Threads must not share an object.
    """

    def __init__(self, name: str, *, timeout_s: float) -> None:
        self.name = name
        self._built_in: Environment | None = None if is_own(name) else built_in(name)
        self._own = [OwnFunctions([name], "environment", timeout_s=timeout_s)] if is_own(name) else []

    def needs(self) -> dict[str, list[str]]:
        """Return the columns without which an own environment cannot be called, under its name; empty if it needs none."""
        needs = [name for own in self._own for name in own.requires(0) if name not in ("messages", "answer")]
        return {self.name: needs} if needs else {}

    def check_columns(self, task: Task, sources: Collection[str]) -> None:
        """Check that the problems of these sources have these columns; raise RewardError if not."""
        check_columns(self.needs(), task, "data.environment", applies=lambda _, source: source in sources)

    def reply(self, problem: Problem, messages: list[Message]) -> Message | None:
        """Return the reply to `messages`, the whole chat; None ends the completion. Raises RewardError on failure."""
        # "messages" comes last, so that a column of that name cannot replace the real one.
        arguments: dict[str, Any] = {"answer": problem.answer, **problem.columns, "messages": messages}
        if self._built_in is not None:
            return checked_reply(self._built_in(**arguments))
        [own] = self._own
        reply: Message | None = own.call(0, arguments)
        return reply
