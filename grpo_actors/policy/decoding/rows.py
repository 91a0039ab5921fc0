"""What the sampler (`batching`) remembers of groups, of completions that have a place, and of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from grpo_actors.policy.decoding.draw import Array, Respond, Sample, SamplingParams
from grpo_actors.policy.model import Policy


@dataclass(slots=True, eq=False)
class Group:
    """Completions of one prompt, handed back together."""

    key: int
    prompt: Sequence[int]
    seeds: Sequence[int]
    samples: list[Sample]
    #: None: a completion has one turn.
    respond: Respond | None
    #: Samples that have or had a place, and those of them to which nothing is added any more.
    placed: int = 0
    ended: int = 0
    #: What `Decoder.prefill` made of its prompt and others, and which of them it is; kept until all samples have a place.
    prompts: Any = None
    index: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """A completion that has a place."""

    place: int
    group: Group
    sample: Sample
    #: One for each of its tokens.
    uniforms: Array
    #: Tokens asked of the device so far: one more than were read.
    asked: int = 0
    ended: bool = False
    #: Tokens of its environment's last reply, and the place in the completion that the first of them takes.
    given: Sequence[int] = ()
    given_from: int = 0

    def given_at(self, place: int) -> int | None:
        """The environment's token at a place of the completion; None: the policy samples it."""
        at = place - self.given_from
        return self.given[at] if 0 <= at < len(self.given) else None

    def record(
        self, token: int, logprob: float, version: int, policy: Policy, params: SamplingParams
    ) -> bool:
        """Append what a step gave to the completion; returns whether that was its last token.

        At the end of a turn the environment is asked.
        """
        sample, limit = self.sample, params.max_new_tokens
        given = self.given_at(len(sample.tokens))
        if given is not None:
            sample.append(given, 0.0, version)
            return False
        sample.append(token, logprob, version)
        sample.finished = policy.ends(sample.turn, params.stop)
        if not sample.finished:
            return len(sample.tokens) == limit
        reply = self.group.respond(sample) if self.group.respond else None
        if reply is None:
            return True
        sample.finished = False
        start = len(sample.tokens)
        stop = start + len(reply)
        if stop >= limit:  # no token would be left for an answer
            return True
        # The step under way was fed the turn's last token; what it draws is the first to be replaced.
        self.given, self.given_from = reply, start
        sample.spans += [start, stop]
        return False


@dataclass(slots=True)
class Step:
    """What the device is computing, and for whom; a row that has ended meanwhile is ignored when it is read."""

    token: mx.array
    logprob: mx.array
    rows: list[Row | None]
    #: Of the weights that compute it.
    version: int
