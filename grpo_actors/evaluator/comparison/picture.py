"""Plot accuracy over updates, each figure with its 95 % interval. Needs matplotlib, which is an optional extra."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.errors import ConfigError
from grpo_actors.evaluator.comparison.result import Result
from grpo_actors.score import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
#: Line styles of the runs, repeated if there are more runs.
LINES = ("-", "--", ":", "-.")


def check_picture(path: Path) -> None:
    """Check, before anything is computed, that the plot can be drawn.

    Raises:
        ConfigError: The file's suffix is not in `SUFFIXES`, or matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot: must end in {' or '.join(SUFFIXES)}, got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: needs matplotlib, which is not installed: pip install 'grpo-actors[plot]'")


def draw(results: Sequence[Result], file: Path, suffix: str) -> None:
    """Draw the plot and write it to `file`.

    Each run has a curve over updates for each figure. A candidate that belongs to no run is a horizontal line. If no
    candidate belongs to a run, the x axis has one position per candidate instead.

    Args:
        results: The results of all candidates.
        file: The file to write.
        suffix: The file format, one of `SUFFIXES`.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and takes half a second to import

    # Not pyplot, which would choose a back end with windows.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    runs = list(dict.fromkeys(result.run for result in results if result.run is not None))
    for line, run in zip(LINES * len(runs), runs, strict=False):
        _draw_run([result for result in results if result.run == run], axes, line, run if runs[1:] else "")
    without_run = [result for result in results if result.run is None]
    if runs:
        for result in without_run:
            level = axes.axhline(100 * result.accuracy.value, color="grey", linewidth=1)
            level.set_label(f"greedy, {result.checkpoint}")
        axes.set_xlabel("update")
    else:
        _draw_points(without_run, axes)
    axes.set_ylabel("held-out accuracy, %")
    axes.set_title(f"{results[0].problems} problems, 95 % intervals", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(file, format=suffix.removeprefix("."), dpi=150)


def _draw_run(results: Sequence[Result], axes: "Axes", line: str, run: str) -> None:
    ordered = sorted(results, key=lambda result: result.update or 0)
    updates = [result.update or 0 for result in ordered]
    for colour, (name, estimates) in enumerate(_figures(ordered)):
        label = f"{name}, {run}" if run else name
        low, high = ([100 * getattr(e, end) for e in estimates] for end in ("low", "high"))
        axes.plot(
            updates, [100 * e.value for e in estimates], line, marker=".", color=f"C{colour}", label=label
        )
        axes.fill_between(updates, low, high, color=f"C{colour}", alpha=0.15, linewidth=0)


def _draw_points(results: Sequence[Result], axes: "Axes") -> None:
    for name, estimates in _figures(results):
        values = [100 * e.value for e in estimates]
        below = [100 * (e.value - e.low) for e in estimates]
        above = [100 * (e.high - e.value) for e in estimates]
        axes.errorbar(range(len(values)), values, yerr=[below, above], fmt="o", capsize=4, label=name)
    axes.set_xticks(range(len(results)), [result.checkpoint for result in results])


def _figures(results: Sequence[Result]) -> Iterator[tuple[str, list[Estimate]]]:
    """Yield the name and the values of each figure, in the order of the colours."""
    yield "greedy", [result.accuracy for result in results]
    samples = [result.sampled for result in results if result.sampled is not None]
    if samples:
        k = samples[0].k
        yield f"avg@{k}", [sampled.avg for sampled in samples]
        if k > 1:
            yield f"maj@{k}", [sampled.maj for sampled in samples]
            yield f"pass@{k}", [sampled.passed[k] for sampled in samples]
