"""Spans: the tokens of a completion that were inserted: an environment's between two turns of the policy, or a closing tag
that ended its thinking.

Each span lies between two sampled tokens. All spans are described by one flat, rising list of bounds: [start, stop,
start, stop, …], where each stop is exclusive. A completion of one turn has no spans of an environment.
"""

from collections.abc import Sequence
from itertools import pairwise


def check_spans(name: str, bounds: Sequence[int], length: int) -> None:
    """Check that a completion of `length` tokens can have these spans; `name` is theirs in an error.

    Raises:
        ValueError: it cannot.
    """
    if not bounds:
        return
    if len(bounds) % 2 or any(a >= b for a, b in pairwise([0, *bounds, length])):
        raise ValueError(
            f"{name} must be rising pairs of bounds between 0 and {length}, got {list(bounds)[:8]}"
        )


def sampled_mask(bounds: Sequence[int], length: int) -> list[bool]:
    """Return for each of `length` tokens whether the policy sampled it."""
    mask = [True] * length
    for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
        mask[start:stop] = [False] * (stop - start)
    return mask
