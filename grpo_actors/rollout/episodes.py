"""Completions of several turns: the policy's turns and the replies of an environment (`tasks.environments`).

This module connects the two sides: an environment works on messages, the sampler (`policy.decoding.batching`) on tokens.
If the environment fails, the completion ends there and `Sample.failure` holds the reason; its reader must not count it
as a valid completion.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from grpo_actors.config import Config
from grpo_actors.config.data import Grade
from grpo_actors.errors import ModelError, RewardError
from grpo_actors.policy.decoding.draw import Respond, Sample
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.model import Policy
from grpo_actors.tasks.own.replying import Replier
from grpo_actors.tasks.task import Message, Problem


@dataclass(frozen=True, slots=True)
class Episodes:
    """The environments of a run, which reply to the turns of its completions."""

    #: Source -> its environment; "" is that of problems that come from no mixture.
    repliers: Mapping[str, Replier]
    policy: Policy
    max_turns: int

    def of(self, problem: Problem) -> Respond | None:
        """Return the function that replies to the turns of a problem's completions; None if they have one turn."""
        replier = self.repliers.get(problem.source)
        return None if replier is None else partial(self._respond, replier, problem)

    def _respond(self, replier: Replier, problem: Problem, sample: Sample) -> list[int] | None:
        if len(sample.replies) + 1 >= self.max_turns:
            return None
        chat = [*problem.messages, *chat_of(self.policy, sample)]
        try:
            reply = replier.reply(problem, chat)
            if reply is None:
                return None
            stopped_by_token = sample.tokens[-1] in self.policy.stop_tokens
            ids = encode_reply(self.policy, reply, after_stop_token=stopped_by_token)
        except (RewardError, ModelError) as error:
            sample.failure = str(error)
            return None
        sample.replies.append(reply)
        return ids


@contextlib.contextmanager
def open_episodes(config: Config, policy: Policy) -> Iterator[Episodes | None]:
    """Open the episodes of a run; None if its completions have one turn.

    Raises:
        RewardError: the environment cannot be loaded.
    """
    environments = config.environments
    if not environments:
        yield None
        return
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context(Replier(name, timeout_s=config.reward.reward_timeout_s))
            for name in dict.fromkeys(environments.values())
        }
        repliers = {source: opened[name] for source, name in environments.items()}
        yield Episodes(repliers, policy, config.rollout.max_turns)


def chat_of(policy: Policy, sample: Sample) -> list[Message]:
    """Return the turns of a completion: the policy's turns, with the replies between them."""
    chat: list[Message] = []
    begin = 0
    # The last reply may lack a span: it did not fit `max_new_tokens`, and the policy never read it.
    for reply, start, stop in zip(sample.replies, sample.spans[::2], sample.spans[1::2], strict=False):
        chat += [_assistant_message(policy, sample.tokens[begin:start]), reply]
        begin = stop
    return [*chat, _assistant_message(policy, sample.tokens[begin:])]


def judged(
    policy: Policy, prompt: Sequence[int], sample: Sample, grade: Grade
) -> tuple[list[Message], str | None]:
    """Return the turns of a completion as rewards judge them, and the thoughts of the last turn.

    Args:
        policy: The policy that sampled it.
        prompt: Token ids of the prompt.
        sample: The completion.
        grade: Whether the last turn is cut down to what follows its thinking, as in section [reward].

    Returns:
        The chat; and the text of the last turn's thinking, None if it has none that ends.
    """
    chat = chat_of(policy, sample)
    opened = policy.begins_thinking(sample.tokens[: sample.turn_start] or prompt)
    thoughts, answer = policy.thinking.divide(chat[-1]["content"], opened=opened)
    if grade == "after_think":
        chat[-1] = {**chat[-1], "content": answer}
    return chat, thoughts


def _assistant_message(policy: Policy, tokens: list[int]) -> Message:
    return {"role": "assistant", "content": policy.decode(tokens)}
