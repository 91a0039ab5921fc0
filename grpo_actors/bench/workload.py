"""Work of a known size: prompts of given lengths, and the length of each completion. Does not use MLX.

A fixed seed makes the work the same in every process and in every round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

import numpy as np

SEED = 0
#: Ragged completions have log-normal lengths, cut at the limit. The median (as a share of the limit) and the share
#: of completions that reach the limit determine the distribution.
MEDIAN_SHARE = 0.45
CUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a batch of groups."""

    groups: int
    generations: int
    #: Tokens of the longest prompt.
    prompt_tokens: int
    #: Tokens of the longest completion.
    tokens: int
    #: Whether lengths vary: prompts between half and all of the tokens, completions as in `completion_lengths`.
    ragged: bool = False
    #: Completions decoded at the same time; None means all.
    places: int | None = None

    @property
    def completions(self) -> int:
        """Number of completions in all groups."""
        return self.groups * self.generations


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch: its prompts and the lengths of their completions."""

    prompts: Sequence[list[int]]
    #: For each prompt, the lengths of its completions.
    lengths: Sequence[list[int]]
    #: Completions decoded at the same time.
    places: int

    @property
    def tokens(self) -> int:
        """Tokens of all completions."""
        return sum(map(sum, self.lengths))


def workload(shape: Shape, vocabulary: int) -> Workload:
    """Build the work: prompts of random ids below `vocabulary`, and completion lengths."""
    random = np.random.default_rng(SEED)
    longest = shape.prompt_tokens
    lengths = np.full(shape.groups, longest)
    if shape.ragged:
        lengths = random.permutation(np.linspace(longest / 2, longest, shape.groups).round().astype(int))
    prompts = [random.integers(vocabulary, size=max(1, length)).tolist() for length in lengths]
    completions = random.permutation(completion_lengths(shape.completions, shape.tokens, ragged=shape.ragged))
    return Workload(
        prompts,
        completions.reshape(shape.groups, shape.generations).tolist(),
        min(shape.places or shape.completions, shape.completions),
    )


def completion_lengths(count: int, limit: int, *, ragged: bool) -> list[int]:
    """Return lengths in rising order: quantiles instead of draws, so that every count has the same distribution."""
    if not ragged:
        return [limit] * count
    # P(length ≥ limit) = CUT_SHARE  ⇔  ln(1 / MEDIAN_SHARE) / σ = Φ⁻¹(1 − CUT_SHARE).
    normal = NormalDist()
    sigma = log(1 / MEDIAN_SHARE) / normal.inv_cdf(1 - CUT_SHARE)
    shares = (MEDIAN_SHARE * exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return [max(1, min(limit, round(share * limit))) for share in shares]
