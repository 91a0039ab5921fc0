"""Format numbers and untrusted text for a terminal, as plain strings without colours."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from grpo_actors.observe.records import Record
from grpo_actors.observe.view import RunView, mapping, number

UNKNOWN = "–"
_BARS = "▁▂▃▄▅▆▇█"


def printable(text: Any) -> str:
    """Return the text as one line without control characters: a model may sample escape sequences."""
    words = " ".join(str(text).split())
    return "".join(character if character.isprintable() else "�" for character in words)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row with aligned columns: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                first.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
            ]
        ).rstrip()
        for first, *rest in rows
    ]


def fixed(value: float | None, digits: int = 2) -> str:
    """Format ``0.62``; a number too small for `digits`, or 1e7 and more, as ``3.1e-05``."""
    if value is None:
        return UNKNOWN
    if (value and abs(value) < 10**-digits) or abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """Format a share from 0 to 1 as ``12 %``; below 10 % with one decimal, so that rare events stay visible."""
    if value is None:
        return UNKNOWN
    percent = 100 * value
    if 0 < percent < 0.05:
        return "<0.1 %"
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"


def count(value: float | None) -> str:
    """Format ``950``, ``12.3k``, ``4.5M``."""
    if value is None:
        return UNKNOWN
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Format seconds as ``0:42``, ``12:05``, ``3:07:09``."""
    if seconds is None or seconds >= 1e8:
        return UNKNOWN
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bytes_text(value: float | None) -> str:
    """Format a size: ``950 kB``, ``12.3 MB``, ``4.5 GB``."""
    if value is None:
        return UNKNOWN
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value / 1e3:.0f} kB"


def pace(updates_per_s: float | None) -> str:
    """Format updates per second, or seconds per update if that is the larger number."""
    if not updates_per_s:
        return UNKNOWN
    return f"{updates_per_s:.1f} up/s" if updates_per_s >= 1 else f"{1 / updates_per_s:.1f} s/up"


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw a curve in at most `width` characters: average neighbours, leave out unknown values."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or width < 1:
        return ""
    columns = min(width, len(known))
    edges = [round(column * len(known) / columns) for column in range(columns + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BARS[0] * columns
    return "".join(_BARS[round((mean - low) / (high - low) * (len(_BARS) - 1))] for mean in means)


def progress(view: RunView) -> str:
    """Format ``12/110``, or ``12`` if the planned number is unknown."""
    return f"{view.update}/{view.total_updates}" if view.total_updates else str(view.update)


def status_line(view: RunView, *, width: int | None = None) -> str:
    """Format the run in one line: ``update 12/110  reward 0.62  accuracy 0.41 @10  greedy  loss …  1.2 up/s``.

    If `width` is too narrow, KL, length, pace, loss and how answers were made are left out, in this order.
    """
    metrics = view.metrics
    parts = {
        "update": f"update {progress(view)}",
        "reward": f"reward {fixed(number(metrics, 'reward_mean'))}",
        "score": "" if view.last_eval is None else score(view.last_eval),
        "how": "" if view.last_eval is None else how(view.last_eval),
        "loss": f"loss {fixed(number(metrics, 'loss'), 4)}",
        "KL": f"KL {fixed(number(metrics, 'kl'), 4)}",
        "length": f"len {fixed(number(metrics, 'completion_length_mean'), 0)}",
        "pace": pace(view.updates_per_s),
    }
    for dropped in ("KL", "length", "pace", "loss", "how"):
        if width is None or len(_joined(parts)) <= width:
            break
        del parts[dropped]
    return _joined(parts)


def _joined(parts: Mapping[str, str]) -> str:
    return "  ".join(part for part in parts.values() if part)


def score(evaluation: Record) -> str:
    """Format ``accuracy 0.41 @10``; of a reward function, its name without its file."""
    value = fixed(number(mapping(evaluation, "score"), "value"))
    return f"{metric(evaluation).rpartition(':')[2]} {value} @{count(number(evaluation, 'update'))}"


def metric(evaluation: Record) -> str:
    """Return the name of what decides which checkpoint is best."""
    return printable(mapping(mapping(evaluation, "score"), "measure").get("metric", "score"))


def how(evaluation: Record) -> str:
    """Return how the answers were made that decide: ``greedy``, or ``sampled at 1``."""
    temperature = number(mapping(mapping(evaluation, "score"), "measure"), "temperature")
    return f"sampled at {temperature:g}" if temperature else "greedy"


def estimate(record: Mapping[str, Any], key: str) -> str:
    """Format ``0.41 [0.35, 0.47]``, the estimate at `key` of a record with its 95 % interval."""
    found = mapping(record, key)
    low, high = number(found, "low"), number(found, "high")
    interval = "" if low is None or high is None else f" [{fixed(low)}, {fixed(high)}]"
    return f"{fixed(number(found, 'value'))}{interval}"


def eval_line(evaluation: Record) -> str:
    """Format one evaluation with its interval, to be printed when it arrives."""
    problems = number(mapping(mapping(evaluation, "score"), "measure"), "problems")
    sources = mapping(evaluation, "by_source")
    on = "" if problems is None else f" on {count(problems)} problems"
    parts = [
        f"eval @{count(number(evaluation, 'update'))}",
        f"{metric(evaluation)} {estimate(evaluation, 'score')}, {how(evaluation)}{on}",
        f"gain {estimate(evaluation, 'gain')}" if mapping(evaluation, "gain") else "",
        *(f"{printable(name)} {estimate(sources, name)}" for name in sources),
        "best so far" if evaluation.get("best") is True else "",
    ]
    return "  ".join(part for part in parts if part)


def headcount_line(decision: Record) -> str:
    """Format a decision about the worker pool: ``rollout workers: 1 → 2 (…)``."""
    before, workers = number(decision, "before"), number(decision, "workers")
    change = f"{count(workers)}, settled" if before == workers else f"{count(before)} → {count(workers)}"
    return f"rollout workers: {change} ({printable(decision.get('reason'))})"


def stop_line(record: Record) -> str:
    """Format how the run ended."""
    code = number(record, "exit_code")
    with_code = f" (exit code {code:.0f})" if code else ""
    return f"run ended: {printable(record.get('reason'))}{with_code}"
