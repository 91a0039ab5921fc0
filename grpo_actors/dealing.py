"""Dealing things of different sizes to ranks: micro-batches by their tokens, trained arrays by their elements. Pure."""

from collections.abc import Sequence


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide things among ranks, so that the largest share is small.

    The largest goes first, each to the rank that has least so far.

    Args:
        sizes: Size of each, such as the positions B · T of a micro-batch.
        ranks: Number of ranks; some get nothing if there are fewer things.

    Returns:
        The numbers of the things of each rank, in order.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        rank = totals.index(min(totals))
        dealt[rank].append(number)
        totals[rank] += sizes[number]
    return [sorted(numbers) for numbers in dealt]
