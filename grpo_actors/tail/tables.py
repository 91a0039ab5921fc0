"""Build the four blocks of numbers in the view of a run, as tables of label and value.

Each function takes the `RunView` and the width in columns. `grpo_actors.tail.panel` decides where the
blocks go. This module imports rich, so it is imported late.
"""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from grpo_actors.observe.records import Record
from grpo_actors.observe.text import (
    UNKNOWN,
    count,
    estimate,
    fixed,
    how,
    metric,
    printable,
    share,
    sparkline,
)
from grpo_actors.observe.view import GONE, RunView, mapping, number, numbers

WORKERS_SHOWN = 8
REWARDS_SHOWN = 6
_LABEL_WIDTH = 12
#: Columns of the number in front of a curve; a longer one takes some of the curve's.
_NUMBER_WIDTH = 12
#: From this width on, a worker's line also shows its number of groups and its memory.
_WIDE_LINE = 48
_STATE_STYLE = {
    "sampling": "green",
    "joined": "cyan",
    "waiting": "yellow",
    "quarantined": "bold red",
    "left": "dim",
    "lost": "bold red",
}


def learning(view: RunView, width: int) -> Table:
    """Show what the last update did to the policy."""
    m = view.metrics
    curve_width = width - _LABEL_WIDTH - _NUMBER_WIDTH - 3  # three gaps
    table = _block("learning")
    reward = f"{fixed(number(m, 'reward_mean'))} ± {fixed(number(m, 'reward_std'))}"
    _row(
        table,
        "reward",
        _with_curve(reward, [point.reward for point in view.curve], curve_width, "bold green"),
    )
    for name, mean in list(numbers(m, "rewards").items())[:REWARDS_SHOWN]:
        _row(table, f"  {printable(name)}", fixed(mean))
    _row(
        table,
        "loss",
        _with_curve(
            fixed(number(m, "loss"), 4), [point.loss for point in view.curve], curve_width, "magenta"
        ),
    )
    _row(table, "KL", fixed(number(m, "kl"), 4))
    _row(table, "ratio", _mean_max(fixed(number(m, "ratio_mean"), 4), fixed(number(m, "ratio_max"), 2)))
    _row(table, "clipped", f"{share(number(m, 'clip_share'))} of tokens")
    _row(
        table,
        "worker gap",
        _mean_max(fixed(number(m, "logprob_gap_mean"), 4), fixed(number(m, "logprob_gap_max"), 3)),
    )
    _row(table, "entropy", fixed(number(m, "entropy"), 3))
    _row(table, "grad norm", fixed(number(m, "grad_norm"), 3))
    rate = number(m, "learning_rate")
    _row(table, "lr", UNKNOWN if rate is None else f"{rate:.2e}")
    skipped = number(m, "skipped_steps")
    if skipped:
        _row(table, "skipped", Text(f"{skipped:.0f} non-finite steps", style="bold red"))
    return table


def rollout(view: RunView, width: int) -> Table:
    """Show what was sampled for the last update, how stale it was, and the speed of both halves."""
    m = view.metrics
    curve_width = width - _LABEL_WIDTH - _NUMBER_WIDTH - 3  # three gaps
    table = _block("rollout and speed")
    length = _mean_max(
        fixed(number(m, "completion_length_mean"), 0), fixed(number(m, "completion_length_max"), 0)
    )
    _row(
        table,
        "length",
        _with_curve(length, [point.length for point in view.curve], curve_width, "cyan"),
    )
    _row(table, "truncated", f"{share(number(m, 'truncated_share'))} of completions")
    _row(table, "zero var.", f"{share(number(m, 'zero_variance_share'))} of groups")
    if chosen := _selection(m):
        _row(table, "selection", chosen)
    for label, bar in _staleness(m):
        _row(table, label, bar)
    for half in ("rollout", "learner"):
        rate, waits = number(m, f"{half}_tokens_per_s"), number(m, f"{half}_wait_share")
        place = "" if view.start is None or half == "rollout" else view.start.get("device")
        where = f", {printable(place)}" if place else ""
        _row(table, half, f"{count(rate)} tok/s, waits {share(waits)}{where}")
    _row(table, "update", f"{fixed(number(m, 'update_s'))} s")
    _row(
        table, "batch", f"{count(number(m, 'groups'))} groups, {count(number(m, 'completions'))} completions"
    )
    _row(table, "tokens", f"{count(number(m, 'tokens'))}, {share(number(m, 'padding_share'))} padding")
    peers_gb = sum(numbers(m, "peers_memory_gb").values())
    _row(table, "memory", f"learner {fixed(number(m, 'memory_gb'))} GB, others {fixed(peers_gb)} GB")
    return table


def _selection(metrics: Record | None) -> str:
    """Format groups and problems left out: ``3 passed over, 12 skipped``; empty without selection or curriculum."""
    parts = []
    if metrics is not None and metrics.get("groups_passed_over") is not None:
        parts.append(f"{count(sum(numbers(metrics, 'groups_passed_over').values()))} passed over")
    if (skipped := number(metrics, "problems_skipped")) is not None:
        parts.append(f"{count(skipped)} skipped")
    return ", ".join(parts)


def _staleness(metrics: Record | None) -> list[tuple[str, Text]]:
    """Return a label and a bar for each staleness in versions; 4 and more share one bar."""
    groups = {int(key): n for key, n in numbers(metrics, "staleness").items() if key.isdecimal() and n > 0}
    total = sum(groups.values())
    if not total:
        return [("staleness", Text(UNKNOWN))]
    shown = {str(key): groups[key] for key in sorted(groups) if key < 4}
    if old := sum(n for key, n in groups.items() if key >= 4):
        shown["4+"] = old
    rows = []
    for index, (key, n) in enumerate(shown.items()):
        bar = Text(f"{key:>2} ")
        bar.append("█" * max(round(12 * n / total), 1), style="blue")
        rows.append(("staleness" if index == 0 else "", bar.append(f" {share(n / total)}")))
    return rows


def evaluation(view: RunView, width: int) -> Table:
    """Show the newest evaluation, the best one, and the curve of all."""
    last, best = view.last_eval, view.best_eval
    table = _block("evaluation" if last is None else f"evaluation: {metric(last)}, {how(last)}")
    if last is None:
        _row(table, "", Text("none yet", style="dim"))
        return table
    values = [number(mapping(record, "score"), "value") for record in view.evals]
    curve = sparkline(values, width - _LABEL_WIDTH - 8)
    score = mapping(last, "score")
    _row(
        table,
        f"@{count(number(last, 'update'))}",
        Text(fixed(number(score, "value")), style="bold green").append(f" {curve}"),
    )
    _row(table, "95 %", f"{fixed(number(score, 'low'))} to {fixed(number(score, 'high'))}")
    if best is not None:
        value = fixed(number(mapping(best, "score"), "value"))
        _row(table, "best", f"{value} @{count(number(best, 'update'))}")
    if mapping(last, "gain"):
        _row(table, "gain", estimate(last, "gain"))
    length, cut = number(last, "completion_length_mean"), number(last, "truncated_share")
    _row(table, "length", f"{fixed(length, 0)}, {share(cut)} truncated")
    return table


def workers(view: RunView, width: int) -> Table:
    """Show one line per worker; workers that have left or are lost come last."""
    table = _block("workers")
    ordered = sorted(view.workers.items(), key=lambda item: (item[1].get("state") in GONE, item[0]))
    for name, record in ordered[:WORKERS_SHOWN]:
        state = printable(record.get("state"))
        line = Text(f"{state:8}", style=_STATE_STYLE.get(state, ""))
        if state == "quarantined":
            _row(table, printable(name)[:_LABEL_WIDTH], line.append(f" {printable(record.get('why'))}"))
            continue
        line.append(f" v{count(number(record, 'version'))}", style="default")
        line.append(f" {count(number(record, 'tokens_per_s'))} tok/s", style="default")
        if place := record.get("device"):
            line.append(f" {printable(place)}", style="default")
        if width >= _WIDE_LINE:
            line.append(f"  {count(number(record, 'groups'))} groups", style="default")
            line.append(f"  {fixed(number(record, 'memory_gb'))} GB", style="default")
        _row(table, printable(name)[:_LABEL_WIDTH], line)
    if not ordered:
        _row(table, "", Text("none yet", style="dim"))
    if len(ordered) > WORKERS_SHOWN:
        _row(table, "", f"and {len(ordered) - WORKERS_SHOWN} more")
    if view.headcount is not None:
        wanted = count(number(view.headcount, "workers"))
        _row(table, "wanted", f"{wanted}: {printable(view.headcount.get('reason'))}")
    return table


def _block(title: str) -> Table:
    table = Table(
        title=Text(title, style="bold blue"),
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 1, 0, 0),
        expand=True,
    )
    table.add_column(width=_LABEL_WIDTH, no_wrap=True, style="dim", overflow="ellipsis")
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    return table


def _row(table: Table, label: str, value: str | Text) -> None:
    # A Text, because rich would read a plain string as markup.
    table.add_row(Text(label), value if isinstance(value, Text) else Text(value))


def _with_curve(value: str, curve: Sequence[float | None], width: int, style: str) -> Text:
    left = max(0, width - max(0, len(value) - _NUMBER_WIDTH))
    return Text(f"{value:{_NUMBER_WIDTH}} ", style=style).append(sparkline(curve, left), style="not bold")


def _mean_max(mean: str, largest: str) -> str:
    return f"{mean} max {largest}"
