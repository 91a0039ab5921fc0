"""Compute the order of problems and the seeds of their samples; both are pure functions without state.

Position s of the order is a problem of epoch s // n, with n problems. Any position can be computed at any
time, so a resumed run needs only a cursor, and a lease that is granted again is the same lease.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import xxhash


@dataclass(frozen=True, slots=True)
class Position:
    """The problem at one position of the order."""

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
        """Return the problem at a position, 0 or more."""
        epoch, offset = divmod(position, self.count)
        return Position(epoch, permutation(self.count, self.seed, epoch)[offset] if self.shuffle else offset)


@lru_cache(maxsize=64)  # of each source the epoch being sampled, the one being trained, and the next
def permutation(count: int, seed: int | str, epoch: int) -> tuple[int, ...]:
    """Return the numbers below `count` in the order of an epoch."""
    indices = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(indices)
    return tuple(indices)


def sample_seeds(run_seed: int, epoch: int, problem_id: str, samples: int) -> list[int]:
    """Return one 64-bit seed for each completion of a group.

    Seeds depend on the problem, not on the worker or the time: a lease that was lost with its worker
    gives the same completions at its next attempt.
    """
    return [
        xxhash.xxh3_64_intdigest(f"{run_seed}/{epoch}/{problem_id}/{sample}".encode())
        for sample in range(samples)
    ]
