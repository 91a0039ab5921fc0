"""Measured figures, and their output as a table or as JSON. Does not use MLX."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from grpo_actors import __version__
from grpo_actors.observe.text import aligned

COLUMNS = ("what", "median", "min–max", "floor", "× floor")


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table: a quantity with its unit, measured once a round."""

    what: str
    values: Sequence[float]
    #: Best possible value on this machine, in the same unit; None if there is no such bound.
    floor: float | None = None
    #: Whether larger values are better.
    is_rate: bool = False

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return median(self.values)

    @property
    def times_floor(self) -> float | None:
        """Time taken divided by the floor's time, for rates too: 1 is the best."""
        if self.floor is None:
            return None
        return self.floor / self.median if self.is_rate else self.median / self.floor


def as_table(figures: Sequence[Figure], machine: Mapping[str, Any]) -> str:
    """Return the machine in one line, then one line for each figure."""
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join([described, *aligned([COLUMNS, *(_cells(figure) for figure in figures)])])


def as_json(figures: Sequence[Figure], machine: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Return one JSON object: the machine, the command line's options, and each figure with all its rounds."""
    rounds = {
        figure.what: {
            "median": figure.median,
            "min": min(figure.values),
            "max": max(figure.values),
            "values": list(figure.values),
            "floor": figure.floor,
            "times_floor": figure.times_floor,
        }
        for figure in figures
    }
    document = {
        "version": __version__,
        "machine": dict(machine),
        "parameters": dict(parameters),
        "figures": rounds,
    }
    return json.dumps(document, indent=2, allow_nan=False)


def _cells(figure: Figure) -> tuple[str, ...]:
    spread = f"{number(min(figure.values))}–{number(max(figure.values))}"
    floor, ratio = figure.floor, figure.times_floor
    return (
        figure.what,
        number(figure.median),
        spread,
        "" if floor is None else number(floor),
        "" if ratio is None else f"{ratio:,.1f}",
    )


def number(value: float) -> str:
    """Format with three significant digits; a number of four or more digits as a whole number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
