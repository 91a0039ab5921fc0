"""Work of a known size: prompts of given lengths, and the length of each completion. Does not use MLX.

A fixed seed makes the work the same in every process and in every round.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import NormalDist

import numpy as np

from grpo_actors.errors import ConfigError

SEED = 0
#: Distributions of the completions' lengths by name; any other name is a file with a JSON list of lengths in tokens.
EQUAL, LOG_NORMAL, RECORDED = "equal", "log-normal", "recorded"
#: Environment variable with such a name, for the workers of a run that the bench started.
LENGTHS = "GRPO_ACTORS_BENCH_LENGTHS"
#: Log-normal completions have lengths that are cut at the limit. The median (as a share of the limit) and the share
#: of completions that reach the limit determine the distribution.
MEDIAN_SHARE = 0.45
CUT_SHARE = 0.2
#: Recorded lengths: (share of the completions, length that they stay within, as a share of the limit). From
#: Qwen2.5-Coder-0.5B-Instruct while it trained on GSM8K with a limit of 256 tokens: a mean of 130, and 8 % at the limit.
#: Both are measured; the points between the ends are a smooth curve with that mean.
RECORDED_QUANTILES = tuple(
    (share, tokens / 256)
    for share, tokens in (
        *(
            (0.0, 40),
            (0.1, 66),
            (0.2, 82),
            (0.3, 95),
            (0.4, 107),
            (0.5, 119),
            (0.6, 132),
            (0.7, 148),
            (0.8, 172),
        ),
        *((0.9, 215), (0.92, 256), (1.0, 256)),
    )
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a batch of groups."""

    groups: int
    generations: int
    #: Tokens of the longest prompt.
    prompt_tokens: int
    #: Tokens of the longest completion.
    tokens: int
    #: Distribution of the completions' lengths, as in `completion_lengths`. Unless they are equal, prompts have between
    #: half and all of their tokens.
    lengths: str = EQUAL
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
    if shape.lengths != EQUAL:
        lengths = random.permutation(np.linspace(longest / 2, longest, shape.groups).round().astype(int))
    prompts = [random.integers(vocabulary, size=max(1, length)).tolist() for length in lengths]
    completions = random.permutation(completion_lengths(shape.completions, shape.tokens, shape.lengths))
    return Workload(
        prompts,
        completions.reshape(shape.groups, shape.generations).tolist(),
        min(shape.places or shape.completions, shape.completions),
    )


def completion_lengths(count: int, limit: int, distribution: str) -> list[int]:
    """Return lengths in rising order: quantiles instead of draws, so that every count has the same distribution.

    Args:
        count: Number of completions.
        limit: Longest length in tokens.
        distribution: `EQUAL`, `LOG_NORMAL`, `RECORDED`, or a file.

    Raises:
        ConfigError: the file is not a JSON list of lengths.
    """
    middles = (np.arange(count) + 0.5) / count
    if distribution == EQUAL:
        lengths = [float(limit)] * count
    elif distribution == LOG_NORMAL:
        # P(length ≥ limit) = CUT_SHARE  ⇔  ln(1 / MEDIAN_SHARE) / σ = Φ⁻¹(1 − CUT_SHARE).
        normal = NormalDist()
        sigma = log(1 / MEDIAN_SHARE) / normal.inv_cdf(1 - CUT_SHARE)
        lengths = [limit * MEDIAN_SHARE * exp(sigma * normal.inv_cdf(middle)) for middle in middles]
    elif distribution == RECORDED:
        shares, values = zip(*RECORDED_QUANTILES, strict=True)
        lengths = (limit * np.interp(middles, shares, values)).tolist()
    else:
        lengths = np.quantile(_read_lengths(distribution), middles).tolist()
    return [max(1, min(limit, round(length))) for length in lengths]


def _read_lengths(file: str) -> list[int]:
    try:
        lengths = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"--lengths: must be {EQUAL}, {LOG_NORMAL}, {RECORDED} or a file, got {file} ({error.strerror})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--lengths: {file} is not JSON: {error}") from error
    if not isinstance(lengths, list) or not lengths or not all(type(n) is int and n >= 1 for n in lengths):
        raise ConfigError(f"--lengths: {file} must be a JSON list of lengths of at least 1 token")
    return lengths
