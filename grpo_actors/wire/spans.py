"""Which tokens of a completion an environment put between two turns of the policy.

They come in runs, each between two sampled tokens, and are told by their bounds in one flat list: [start, stop, start,
stop, …), rising. A completion of one turn has none.
"""

from collections.abc import Sequence
from itertools import pairwise


def check_spans(bounds: Sequence[int], length: int) -> None:
    """Refuse bounds that no completion of `length` tokens has.

    Raises:
        ValueError: they are such.
    """
    if not bounds:
        return
    if len(bounds) % 2 or any(a >= b for a, b in pairwise([0, *bounds, length])):
        raise ValueError(
            f"inserted must be rising pairs of bounds between 0 and {length}, got {list(bounds)[:8]}"
        )


def sampled_mask(bounds: Sequence[int], length: int) -> list[bool]:
    """Of each of `length` tokens whether the policy sampled it."""
    mask = [True] * length
    for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
        mask[start:stop] = [False] * (stop - start)
    return mask
