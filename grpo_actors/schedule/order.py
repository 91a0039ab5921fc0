"""The order of problems, and the randomness of their samples: both are functions, not states.

Position s of the order is a problem of epoch s // n. Any position can be asked for at any time, so
a resumed run needs no more than a cursor, and a lease that is granted again is the same lease.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import xxhash


@dataclass(frozen=True, slots=True)
class Position:
    """What stands at one place of the order."""

    epoch: int
    #: Index into the task's training problems.
    index: int


@dataclass(frozen=True)
class ProblemOrder:
    """An endless order: epoch after epoch, each shuffled by its own key."""

    count: int
    seed: int
    shuffle: bool = True

    def at(self, position: int) -> Position:
        """The problem at a position, 0 or more."""
        epoch, place = divmod(position, self.count)
        return Position(epoch, _permutation(self.count, self.seed, epoch)[place] if self.shuffle else place)


@lru_cache(maxsize=4)  # the epoch that is sampled, the one that trains, and the next
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    indices = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(indices)
    return tuple(indices)


def sample_seeds(run_seed: int, epoch: int, problem_id: str, samples: int) -> list[int]:
    """One 64-bit seed for each completion of a group.

    They depend on what is sampled, not on who samples it or when: a lease that was lost with its
    worker gives the same completions at its next attempt.
    """
    return [
        xxhash.xxh3_64_intdigest(f"{run_seed}/{epoch}/{problem_id}/{sample}".encode())
        for sample in range(samples)
    ]
