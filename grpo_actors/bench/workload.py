"""Work of a known size: prompts of given lengths, and how long each completion becomes. No MLX.

Drawn from a seed of their own: the same work in every process and in every round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

import numpy as np

SEED = 0
#: Unlike completions: log-normal, cut at the limit. Median and share at the limit, which fix the deviation.
MEDIAN_SHARE = 0.45
CUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a batch of groups."""

    groups: int
    generations: int
    #: Of the longest prompt.
    prompt_tokens: int
    #: Of the longest completion.
    tokens: int
    #: Unlike lengths: prompts of half to all of the tokens, completions as `completion_lengths` says.
    ragged: bool = False
    #: Completions side by side; None: all.
    places: int | None = None

    @property
    def completions(self) -> int:
        """Of all groups."""
        return self.groups * self.generations


@dataclass(frozen=True, slots=True)
class Workload:
    """The batch itself."""

    prompts: Sequence[list[int]]
    #: By prompt, one for each of its completions.
    lengths: Sequence[list[int]]
    places: int

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(map(sum, self.lengths))


def workload(shape: Shape, vocabulary: int) -> Workload:
    """Prompts of random ids below `vocabulary`, and completion lengths."""
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
    """Lengths in rising order: quantiles and no draws, so that every count has the same distribution."""
    if not ragged:
        return [limit] * count
    # P(length ≥ limit) = CUT_SHARE  ⇔  ln(1 / MEDIAN_SHARE) / σ = Φ⁻¹(1 − CUT_SHARE).
    normal = NormalDist()
    sigma = log(1 / MEDIAN_SHARE) / normal.inv_cdf(1 - CUT_SHARE)
    shares = (MEDIAN_SHARE * exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return [max(1, min(limit, round(share * limit))) for share in shares]
