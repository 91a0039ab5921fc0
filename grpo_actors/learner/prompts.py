"""The prompts of the data as the policy reads them: those that are too long are left out before the updates are counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_actors.errors import DataError, ModelError
from grpo_actors.policy.model import Policy
from grpo_actors.tasks.task import Problem, Task


@dataclass
class PromptLimit:
    """The longest prompt of a run, in tokens."""

    policy: Policy
    max_prompt_length: int
    #: Roles of a chat's turns -> tokens that the template adds to their texts, at most.
    _added: dict[tuple[str, ...], int] = field(default_factory=dict)
    _longest: int = 0

    def apply(self, task: Task) -> str | None:
        """Leave out the training problems with a longer prompt; return a line about them, None if there are none.

        Problems that a task makes on demand are measured when they are posed.

        Raises:
            DataError: No problem is left.
            ModelError: The chat template refuses the turns of a problem.
        """
        before = len(task.problems("train"))
        left_out = task.leave_out(self._is_too_long)
        if not left_out:
            return None
        if left_out == before:
            raise DataError(
                f"data.max_prompt_length: no problem has a prompt of at most {self.max_prompt_length} tokens; raise it"
            )
        return (
            f"{left_out:,} of {before:,} training problems have a prompt of more than {self.max_prompt_length} tokens "
            f"(data.max_prompt_length; the longest has {self._longest:,}) and are left out"
        )

    def _is_too_long(self, problem: Problem) -> bool:
        # A token is at least one byte of text, so that most prompts need not be encoded.
        text_bytes = sum(len(message["content"].encode()) for message in problem.messages)
        if text_bytes + self._tokens_added(problem) <= self.max_prompt_length:
            return False
        length = len(self.policy.chat.encode(problem.messages))
        self._longest = max(self._longest, length)
        return length > self.max_prompt_length

    def _tokens_added(self, problem: Problem) -> int:
        roles = tuple(message["role"] for message in problem.messages)
        if roles not in self._added:
            chat: Sequence[Mapping[str, str]] = [{"role": role, "content": "x"} for role in roles]
            try:
                self._added[roles] = len(self.policy.chat.encode(chat))
            except ModelError as error:
                raise ModelError(f"{problem.id}: {error}") from error
        return self._added[roles]
