"""Compute the order of the problems of several sources: each has its share of every stretch, and its own epochs.

Pure, like `order`: any position can be computed at any time. Within a block, the turns of the sources are spread evenly.
Example with 3 turns of a and 2 of b: a b a b a. A source poses its problems one after the other in its turns, each
epoch in another order, however often its turn comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import gcd

from grpo_actors.schedule.order import Position, permutation

#: Turns of a block, about: shares are rounded to thousandths.
BLOCK_TURNS = 1000


def turns_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the turns of each source in a block: as few as possible, in the ratio of the weights, at least one each."""
    total = sum(weights)
    turns = [max(1, round(BLOCK_TURNS * weight / total)) for weight in weights]
    divisor = gcd(*turns)
    return tuple(turn // divisor for turn in turns)


@dataclass(frozen=True)
class MixtureOrder:
    """An endless order of the problems of several sources, whose indices follow one another."""

    #: Number of problems of each source.
    counts: tuple[int, ...]
    #: Turns of each source in a block.
    turns: tuple[int, ...]
    seed: int
    shuffle: bool = True

    def at(self, position: int) -> Position:
        """Return the problem at a position, 0 or more. Its epoch is that of its source."""
        block, offset = divmod(position, sum(self.turns))
        source, rank = _pattern(self.turns)[offset]
        epoch, place = divmod(block * self.turns[source] + rank, self.counts[source])
        count = self.counts[source]
        index = permutation(count, f"{self.seed}/{source}", epoch)[place] if self.shuffle else place
        return Position(epoch, self._starts[source] + index)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return (0, *accumulate(self.counts))


@lru_cache(maxsize=1)
def _pattern(turns: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (source, its turn within the block) for each place of a block: turn t of n comes at (t + ½) / n of it."""
    places = [
        ((2 * rank + 1) / count, source, rank) for source, count in enumerate(turns) for rank in range(count)
    ]
    return [(source, rank) for _, source, rank in sorted(places)]
