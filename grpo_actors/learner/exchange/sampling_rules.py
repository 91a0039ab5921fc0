"""What a worker can have sampled: the rules that every completion of a run follows, whoever sampled it.

A worker is another process, perhaps on another machine. A broken one may send anything, so what it claims is compared with
what its sampler does (`policy.decoding`). The text of a completion is not among the claims: the learner decodes the tokens
itself where it needs a text. Whether the log-probs are the policy's is measured by the update (`schedule.quarantine`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_actors.errors import ProtocolError
from grpo_actors.learner.groups import SampledCompletion
from grpo_actors.wire.spans import sampled_mask

#: Log-probs of a sampled token. Rounding may lift one above 0, a little more where the temperature is low. Float32 draws
#: nothing below −120, but the log-prob is recorded before filters and penalties, which may make an unlikely token the best.
LOGPROB_BOUNDS = (-1000.0, 0.01)


@dataclass(frozen=True)
class SamplingRules:
    """The rules of one run."""

    #: Number of token ids that the model can predict.
    vocabulary: int
    max_new_tokens: int
    #: Most turns of a completion; 1 without an environment.
    max_turns: int
    #: Token ids that end a turn.
    stop_tokens: frozenset[int]
    #: Whether the last token of a turn ends it: a stop token, or one that completes a stop string.
    ends: Callable[[list[int]], bool]
    #: Token ids that end thinking; empty if nothing bounds it.
    closing: tuple[int, ...]
    #: Names of the reward functions; every completion has a value or None for each.
    rewards: frozenset[str]

    def check(self, completion: SampledCompletion, newest_version: int) -> None:
        """Check one completion, sampled with `newest_version` or older ones.

        Raises:
            ProtocolError: no worker of this run can have sampled it; the text says why.
        """
        self._check_tokens(completion)
        self._check_logprobs(completion.logprobs)
        self._check_versions(completion.versions, newest_version)
        self._check_end(completion)
        self._check_forced(completion)
        if completion.rewards.keys() != self.rewards:
            raise ProtocolError(
                f"the rewards are {', '.join(sorted(self.rewards))}, got {', '.join(sorted(completion.rewards))[:200]}"
            )

    def _check_tokens(self, completion: SampledCompletion) -> None:
        tokens = completion.tokens
        if len(tokens) > self.max_new_tokens:
            raise ProtocolError(f"a completion has at most {self.max_new_tokens} tokens, got {len(tokens)}")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.vocabulary:
            raise ProtocolError(f"token ids lie in 0 … {self.vocabulary - 1}, got {low} … {high}")
        if completion.turns > self.max_turns:
            raise ProtocolError(f"a completion has at most {self.max_turns} turns, got {completion.turns}")

    @staticmethod
    def _check_logprobs(logprobs: list[float]) -> None:
        low, high = LOGPROB_BOUNDS
        if min(logprobs) < low or max(logprobs) > high:
            raise ProtocolError(
                f"log-probs lie in {low:g} … {high:g}, got {min(logprobs):g} … {max(logprobs):g}"
            )

    @staticmethod
    def _check_versions(versions: list[int], newest: int) -> None:
        low, high = min(versions), max(versions)
        if low < 0 or high > newest:
            raise ProtocolError(f"version {newest} is the newest, got {low} … {high}")
        # A worker never goes back to an older version in mid-completion.
        if versions != sorted(versions):
            raise ProtocolError("the versions of a completion's tokens never fall")

    def _check_end(self, completion: SampledCompletion) -> None:
        """Check that each turn ends where the sampler ends it, and that the stop reason is that of the last one."""
        turns = [completion.tokens[start:stop] for start, stop in completion.turn_bounds]
        if not all(self.stop_tokens.isdisjoint(turn[:-1]) for turn in turns):
            raise ProtocolError("a turn ends with its first stop token, got more tokens after it")
        if not all(map(self.ends, turns[:-1])):
            raise ProtocolError("an environment replies at the end of a turn, got a reply without one")
        ends, length = self.ends(turns[-1]), len(completion.tokens)
        if completion.finished and not ends:
            raise ProtocolError("a finished completion ends with a stop token or string, got another end")
        # A turn that ended may be the last for another reason: the environment's reply did not fit in.
        if not completion.finished and ends and len(turns) == self.max_turns:
            raise ProtocolError("a completion that ends with a stop token or string is finished")
        if not ends and length < self.max_new_tokens:
            raise ProtocolError(
                f"a completion without an end has {self.max_new_tokens} tokens (rollout.max_new_tokens), got {length}"
            )

    def _check_forced(self, completion: SampledCompletion) -> None:
        """Check that what was inserted to end thinking is the closing tag, and that no environment inserted it."""
        in_turn = sampled_mask(completion.inserted, len(completion.tokens))
        for start, stop in zip(completion.forced[::2], completion.forced[1::2], strict=True):
            before = stop - len(self.closing)  # the model may have written the first tokens of the tag
            if not before <= start < stop or tuple(completion.tokens[before:stop]) != self.closing:
                raise ProtocolError(
                    f"only the closing tag {list(self.closing)} is inserted, got {completion.tokens[start:stop][:8]}"
                )
            if not all(in_turn[min(before, start - 1) : stop]):
                raise ProtocolError(
                    "a closing tag is inserted within a turn, got one within an environment's reply"
                )
