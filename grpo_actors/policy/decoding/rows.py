"""What continuous batching (`batching`) remembers of groups, of completions that have a place, and of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from grpo_actors.policy.decoding.draw import Array, Respond, Sample
from grpo_actors.policy.decoding.window import Prompts


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
    #: Its keys and values, with those of others, and which of them it is; kept until all samples have a place.
    prompts: Prompts | None = None
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


@dataclass(slots=True)
class Step:
    """What the device is computing, and for whom; a row that has ended meanwhile is ignored when it is read."""

    token: mx.array
    logprob: mx.array
    rows: list[Row | None]
    #: Of the weights that compute it.
    version: int
