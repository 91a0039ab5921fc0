"""Completions of several turns: what the policy says, and what an environment (`tasks.environments`) replies.

Joins the two halves: an environment knows messages, the sampler (`policy.decoding.batching`) tokens. A completion whose
environment fails ends there, and says so (`Sample.failure`): it is for its reader to count it as none.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from grpo_actors.config import Config
from grpo_actors.errors import ModelError, RewardError
from grpo_actors.policy.decoding.draw import Respond, Sample
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.model import Policy
from grpo_actors.tasks.own.replying import Replier
from grpo_actors.tasks.task import Message, Problem


@dataclass(frozen=True, slots=True)
class Episodes:
    """How the completions of a run go on after a turn."""

    replier: Replier
    policy: Policy
    max_turns: int

    def of(self, problem: Problem) -> Respond:
        """What answers the turns of a problem's completions."""
        return partial(self._respond, problem)

    def _respond(self, problem: Problem, sample: Sample) -> list[int] | None:
        if len(sample.replies) + 1 >= self.max_turns:
            return None
        chat = [*problem.messages, *chat_of(self.policy, sample)]
        try:
            reply = self.replier.reply(problem, chat)
            if reply is None:
                return None
            stopped_by_token = sample.tokens[-1] in self.policy.stop_tokens
            ids = encode_reply(self.policy, reply, after_stop_token=stopped_by_token)
        except (RewardError, ModelError) as error:
            sample.failure = f"environment {self.replier.name}, problem {problem.id}: {error}"
            return None
        sample.replies.append(reply)
        return ids


@contextlib.contextmanager
def episodes(config: Config, policy: Policy) -> Iterator[Episodes | None]:
    """Those of a run; None: its completions have one turn.

    Raises:
        RewardError: the environment cannot be loaded.
    """
    if not config.data.environment:
        yield None
        return
    with Replier(config.data.environment, timeout_s=config.reward.reward_timeout_s) as replier:
        yield Episodes(replier, policy, config.rollout.max_turns)


def chat_of(policy: Policy, sample: Sample) -> list[Message]:
    """The turns of a completion: the policy's, with the replies between them."""
    chat: list[Message] = []
    begin = 0
    # A last reply that had no room is in no run of tokens, and was never read by the policy.
    for reply, start, stop in zip(sample.replies, sample.spans[::2], sample.spans[1::2], strict=False):
        chat += [_said(policy, sample.tokens[begin:start]), reply]
        begin = stop
    return [*chat, _said(policy, sample.tokens[begin:])]


def _said(policy: Policy, tokens: list[int]) -> Message:
    return {"role": "assistant", "content": policy.decode(tokens)}
