"""The curves of a run: one row per update, one column per number, and their down-sampled form for a screen.

Pure: it knows rows of numbers, not records, files or figures. A number that was not measured is NaN.
"""

from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class Band(NamedTuple):
    """A down-sampled curve: mean, least and largest value of each bucket, all [buckets]; NaN for an empty bucket."""

    mean: Array
    low: Array
    high: Array


class Sampled(NamedTuple):
    """Curves on one axis."""

    #: Mean update of each bucket, [buckets].
    x: Array
    curves: dict[str, Band]
    #: Updates in a bucket; 1: nothing is left out.
    width: int


class Curves:
    """A table that grows by one row per update."""

    def __init__(self) -> None:
        self._updates = array("d")
        self._columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._updates)

    @property
    def names(self) -> list[str]:
        """Names of the columns in order of appearance."""
        return list(self._columns)

    def append(self, update: float, values: Mapping[str, float]) -> None:
        """Add a row. A resumed run repeats updates: rows of this update and later ones are removed first."""
        while self._updates and self._updates[-1] >= update:
            self._updates.pop()
            for column in self._columns.values():
                column.pop()
        for name in values:
            if name not in self._columns:
                self._columns[name] = array("d", [np.nan]) * len(self._updates)
        self._updates.append(update)
        for name, column in self._columns.items():
            column.append(values.get(name, np.nan))

    def latest(self, name: str) -> float | None:
        """Return the newest measured value of a column; None if there is none."""
        return next((x for x in reversed(self._columns.get(name, ())) if not np.isnan(x)), None)

    def sampled(self, buckets: int, first: float = -np.inf, last: float = np.inf) -> Sampled:
        """Return the columns between two updates in at most `buckets` buckets.

        A bucket holds a power of two of rows and begins at a multiple of that, so that buckets stay the same while the
        table grows, until their width doubles. Peaks stay visible: a bucket keeps its least and largest value.
        """
        updates = np.array(self._updates)
        bounds: tuple[tuple[float, Any], ...] = ((first, "left"), (last, "right"))
        start, stop = (int(np.searchsorted(updates, bound, side)) for bound, side in bounds)
        width = 1
        while stop - start > width * buckets:
            width *= 2
        start -= start % width
        x = _buckets(updates[start:stop], width)
        curves = {}
        for name, column in self._columns.items():
            rows = _buckets(np.array(column)[start:stop], width)
            curves[name] = Band(_mean(rows), np.fmin.reduce(rows, axis=1), np.fmax.reduce(rows, axis=1))
        return Sampled(_mean(x), curves, width)


def _buckets(values: Array, width: int) -> Array:
    """Return the values as [buckets, width]; the last bucket is filled with NaN."""
    count = -(-len(values) // width)
    padded = np.full(count * width, np.nan)
    padded[: len(values)] = values
    return padded.reshape(count, width)


def _mean(rows: Array) -> Array:
    """Return the mean of the numbers in each row; NaN where there is none."""
    known = ~np.isnan(rows)
    counts = known.sum(axis=1)
    sums = np.where(known, rows, 0.0).sum(axis=1)
    means: Array = np.divide(sums, counts, out=np.full(len(rows), np.nan), where=counts > 0)
    return means
