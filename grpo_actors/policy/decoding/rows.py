"""The state of the sampler (`batching`): its groups, the completions in its rows, and the step under way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_actors.errors import ConfigError
from grpo_actors.policy.decoding.draw import Array, Respond, Sample, SamplingParams
from grpo_actors.policy.model import Policy
from grpo_actors.policy.thinking import Budget


@dataclass(slots=True, eq=False)
class Group:
    """Completions of one prompt, which are returned together."""

    key: int
    prompt: Sequence[int]
    seeds: Sequence[int]
    samples: list[Sample]
    #: None if a completion has one turn.
    respond: Respond | None
    #: Number of samples that have or had a row, and of those that have ended.
    assigned: int = 0
    ended: int = 0
    #: Result of `Decoder.prefill` for this and other prompts, kept until every sample has a row; None before and after.
    prompts: Any = None
    #: Index of this group's prompt in `prompts`.
    prompt_index: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """A completion that occupies a row of the batch."""

    #: Row index.
    index: int
    group: Group
    sample: Sample
    #: One random number for each token of the completion.
    uniforms: Array
    #: Tokens requested from the device so far: one more than were read.
    requested: int = 0
    ended: bool = False
    #: Bound on the thinking of the turn; None: there is none.
    budget: Budget | None = None
    #: Tokens that were inserted last (an environment's reply, or a closing tag), and the position of the first of them.
    given: Sequence[int] = ()
    given_from: int = 0

    def given_at(self, position: int) -> int | None:
        """Return the inserted token at a position of the completion; None if the policy samples it."""
        at = position - self.given_from
        return self.given[at] if 0 <= at < len(self.given) else None

    def record(
        self, token: int, logprob: float, version: int, policy: Policy, params: SamplingParams
    ) -> bool:
        """Append the token of a step to the completion; return whether that was its last token.

        At the end of a turn, ask the environment for its reply.
        """
        sample, limit = self.sample, params.max_new_tokens
        given = self.given_at(len(sample.tokens))
        if given is not None:
            sample.append(given, 0.0, version)
            return False
        sample.append(token, logprob, version)
        sample.finished = policy.ends(sample.turn, params.stop)
        if not sample.finished:
            self._bound_thinking(limit)
            return len(sample.tokens) == limit
        reply = self.group.respond(sample) if self.group.respond else None
        if reply is None:
            return True
        sample.finished = False
        start = len(sample.tokens)
        stop = start + len(reply)
        if stop >= limit:  # no token would be left for the next turn
            return True
        self._insert(reply)
        sample.spans += [start, stop]
        if self.budget is not None:
            self.budget = new_budget(policy, params, reply)
        return False

    def _bound_thinking(self, limit: int) -> None:
        """Insert the closing tag if the turn's thinking has used its tokens, unless no token would be left after it."""
        sample = self.sample
        if self.budget is None or not self.budget.is_spent(sample.turn):
            return
        start, closing = len(sample.tokens), self.budget.missing(sample.turn)
        if start + len(closing) < limit:
            self._insert(closing)
            sample.forced += [start, start + len(closing)]
            self.budget.close()

    def _insert(self, tokens: Sequence[int]) -> None:
        # The step under way was fed the last token; the token that it draws is the first to be replaced.
        self.given, self.given_from = tokens, len(self.sample.tokens)


def new_budget(policy: Policy, params: SamplingParams, before: Sequence[int]) -> Budget | None:
    """Return the bound on the thinking of a turn after the tokens `before`; None if there is no bound, or no tag."""
    if not params.think_tokens or not policy.thinking.closing:
        return None
    return Budget(policy.thinking, params.think_tokens, opened=policy.begins_thinking(before))


def require_bound(policy: Policy, think_tokens: int, max_new_tokens: int, setting: str) -> None:
    """Check that the thinking of a model can be bounded; `setting` is the bound's name for the user.

    Raises:
        ConfigError: its vocabulary has no closing tag, or none would leave a token for the answer.
    """
    if not think_tokens:
        return
    closing = policy.thinking.closing
    if not closing or not policy.stop_tokens.isdisjoint(closing):
        raise ConfigError(
            f"{setting}: must be 0 for {policy.name}, whose vocabulary has no tag that ends thinking, got {think_tokens}"
        )
    if think_tokens + len(closing) >= max_new_tokens:
        raise ConfigError(
            f"{setting}: must be less than the {max_new_tokens} tokens of a completion minus the {len(closing)} of the "
            f"closing tag, got {think_tokens}"
        )


@dataclass(slots=True)
class Step:
    """A step that the device is computing, and its rows. A row that ends meanwhile is ignored when the step is read."""

    #: Waits for it; returns the token and the log-prob of each row.
    read: Callable[[], tuple[list[int], list[float]]]
    rows: list[Row | None]
    #: Number of the weights that compute it.
    version: int
