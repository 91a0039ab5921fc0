"""What was measured, and how it is shown: one table, or the same as JSON. Knows no MLX."""

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
    """One row: a quantity with its unit, measured once a round."""

    what: str
    values: Sequence[float]
    #: The best that this machine could do, in the same unit; None: there is no such bound.
    floor: float | None = None
    #: More is better.
    is_rate: bool = False

    @property
    def median(self) -> float:
        """Of the rounds."""
        return median(self.values)

    @property
    def times_floor(self) -> float | None:
        """So many times the floor's time is taken: 1 is the best, for rates too."""
        if self.floor is None:
            return None
        return self.floor / self.median if self.is_rate else self.median / self.floor


def as_table(figures: Sequence[Figure], machine: Mapping[str, Any]) -> str:
    """The machine in one line, then a line for each figure."""
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join([described, *aligned([COLUMNS, *(_cells(figure) for figure in figures)])])


def as_json(figures: Sequence[Figure], machine: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """One object: the machine, what was asked for, and each figure with all its rounds."""
    told = {
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
        "figures": told,
    }
    return json.dumps(document, indent=2, allow_nan=False)


def _cells(figure: Figure) -> tuple[str, ...]:
    spread = f"{_number(min(figure.values))}–{_number(max(figure.values))}"
    floor, ratio = figure.floor, figure.times_floor
    return (
        figure.what,
        _number(figure.median),
        spread,
        "" if floor is None else _number(floor),
        "" if ratio is None else f"{ratio:,.1f}",
    )


def _number(value: float) -> str:
    """Three digits that mean something, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
