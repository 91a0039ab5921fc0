"""The whole view of a run on a terminal: a `RunView` becomes rich renderables that fit width and height.

Numbers come first, completions take the lines that are left. Knows no record stream and no clock of
its own: `now` is given. Imports rich, hence is imported late.
"""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from grpo_actors.observe.records import Record
from grpo_actors.observe.text import (
    UNKNOWN,
    count,
    duration,
    fixed,
    pace,
    printable,
    progress,
    share,
    sparkline,
    stop_line,
)
from grpo_actors.observe.view import GONE, RunView, number, numbers

#: From this many columns on, three blocks stand side by side.
WIDE = 110
WORKERS_SHOWN = 8
REWARDS_SHOWN = 6
#: Silence after which the header says how long it has lasted.
SILENCE_S = 10.0
_LABEL_WIDTH = 11
_STATE_STYLE = {"sampling": "green", "joined": "cyan", "waiting": "yellow", "left": "dim", "lost": "bold red"}


def panel(view: RunView, width: int, height: int, now: float) -> RenderableType:
    """The view, at most `height` lines; `now` in Unix seconds."""
    blocks = [_learning(view, width), _rollout(view, width), _evaluation(view), _workers(view)]
    parts: list[RenderableType] = [_header(view, width, now), *_notes(view)]
    if width >= WIDE:
        parts.append(_beside(blocks[0], blocks[1], Group(blocks[2], Text(), blocks[3])))
    else:
        parts += [_beside(blocks[0], blocks[1]), _beside(blocks[2], blocks[3])]
    room = height - _lines(Group(*parts), width)
    if view.sample is not None and room >= 4:
        parts.append(_sample(view.sample, width, room))
    return Group(*parts)


def _lines(renderable: RenderableType, width: int) -> int:
    console = Console(width=width, height=200, force_terminal=False)
    return len(console.render_lines(renderable, pad=False))


def _header(view: RunView, width: int, now: float) -> RenderableType:
    """Who and how far: two lines."""
    start = view.start or {}
    names = [printable(start[key]) for key in ("run_name", "model_name") if start.get(key)]
    policy = number(view.policy, "version")
    title = Text(" · ".join(names or ["run"]), style="bold", no_wrap=True, overflow="ellipsis")
    if policy is not None:
        title.append(f" · policy v{policy:.0f}", style="not bold dim")
    row = Table.grid(expand=True)
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    row.add_row(title, _state(view, now))
    facts = f"{progress(view)} updates  {pace(view.updates_per_s)}"
    if view.total_updates is None:
        return Group(row, Text(facts))
    facts += f"  {duration(view.remaining_s)} left"
    bar = ProgressBar(total=view.total_updates, completed=view.update, width=max(width - len(facts) - 2, 10))
    below = Table.grid(padding=(0, 2))
    below.add_row(bar, facts)
    return Group(row, below)


def _state(view: RunView, now: float) -> Text:
    if view.stop is not None:
        failed = bool(number(view.stop, "exit_code"))
        return Text(stop_line(view.stop), style="bold red" if failed else "bold green")
    if view.time is None:
        return Text("waiting for the first event", style="yellow")
    if now - view.time > SILENCE_S:
        return Text(f"silent for {duration(now - view.time)}", style="yellow")
    return Text("running", style="green")


def _notes(view: RunView) -> list[RenderableType]:
    """Alarms, each on one line; the two newest."""
    return [
        Text(
            f"! {printable(alarm.get('name'))}: {printable(alarm.get('text'))}",
            style="bold red",
            no_wrap=True,
            overflow="ellipsis",
        )
        for alarm in view.alarms[-2:]
    ]


def _learning(view: RunView, width: int) -> RenderableType:
    m = view.metrics
    room = _spark_room(width)
    table = _block("learning")
    reward = f"{fixed(number(m, 'reward_mean'))} ± {fixed(number(m, 'reward_std'))}"
    _row(table, "reward", _with_curve(reward, [point.reward for point in view.curve], room, "bold green"))
    for name, mean in list(numbers(m, "rewards").items())[:REWARDS_SHOWN]:
        _row(table, f"  {printable(name)}", fixed(mean))
    _row(
        table,
        "loss",
        _with_curve(fixed(number(m, "loss"), 4), [point.loss for point in view.curve], room, "magenta"),
    )
    _row(table, "KL", fixed(number(m, "kl"), 4))
    _row(table, "ratio", _mean_max(fixed(number(m, "ratio_mean"), 3), fixed(number(m, "ratio_max"), 2)))
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


def _rollout(view: RunView, width: int) -> RenderableType:
    m = view.metrics
    table = _block("rollout and speed")
    length = _mean_max(
        fixed(number(m, "completion_length_mean"), 0), fixed(number(m, "completion_length_max"), 0)
    )
    _row(
        table,
        "length",
        _with_curve(length, [point.length for point in view.curve], _spark_room(width), "cyan"),
    )
    _row(table, "truncated", f"{share(number(m, 'truncated_share'))} of completions")
    _row(table, "zero var.", f"{share(number(m, 'zero_variance_share'))} of groups")
    for label, bar in _staleness(m):
        _row(table, label, bar)
    _row(table, "rollout", f"{count(number(m, 'rollout_tokens_per_s'))} tokens/s")
    _row(table, "learner", f"{count(number(m, 'learner_tokens_per_s'))} tokens/s")
    update_s, wait_s = number(m, "update_s"), number(m, "wait_s")
    waiting = share(wait_s / update_s) if update_s and wait_s is not None else UNKNOWN
    _row(table, "update", f"{fixed(update_s)} s, {waiting} waiting")
    _row(
        table, "batch", f"{count(number(m, 'groups'))} groups, {count(number(m, 'completions'))} completions"
    )
    _row(table, "", f"{count(number(m, 'tokens'))} tokens, {share(number(m, 'padding_share'))} padding")
    _row(table, "memory", f"{fixed(number(m, 'memory_gb'))} GB")
    return table


def _staleness(metrics: Record | None) -> list[tuple[str, Text]]:
    """One bar a version of delay; from the fifth on they share one."""
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


def _evaluation(view: RunView) -> RenderableType:
    table = _block("evaluation")
    last, best = view.last_eval, view.best_eval
    if last is None:
        _row(table, "", Text("none yet", style="dim"))
        return table
    curve = sparkline([number(record, "accuracy") for record in view.evals], 12)
    accuracy = Text(fixed(number(last, "accuracy")), style="bold green").append(f" {curve}")
    _row(table, f"@{count(number(last, 'update'))}", accuracy)
    _row(table, "95 %", f"{fixed(number(last, 'accuracy_low'))} to {fixed(number(last, 'accuracy_high'))}")
    if best is not None:
        _row(table, "best", f"{fixed(number(best, 'accuracy'))} @{count(number(best, 'update'))}")
    if (sampled := number(last, "sampled_accuracy")) is not None:
        _row(table, "sampled", fixed(sampled))
    length, cut = number(last, "completion_length_mean"), number(last, "truncated_share")
    _row(table, "length", f"{fixed(length, 0)}, {share(cut)} truncated")
    return table


def _workers(view: RunView) -> RenderableType:
    """One line a worker, those at work first."""
    table = _block("workers")
    ordered = sorted(view.workers.items(), key=lambda item: (item[1].get("state") in GONE, item[0]))
    for name, record in ordered[:WORKERS_SHOWN]:
        state = printable(record.get("state"))
        line = Text(f"{state:8}", style=_STATE_STYLE.get(state, ""))
        line.append(
            f" v{count(number(record, 'version'))}  {count(number(record, 'groups'))} groups", style="default"
        )
        line.append(f"  {count(number(record, 'tokens_per_s'))} tok/s", style="default")
        _row(table, printable(name)[:_LABEL_WIDTH], line)
    if not ordered:
        _row(table, "", Text("none yet", style="dim"))
    if len(ordered) > WORKERS_SHOWN:
        _row(table, "", f"and {len(ordered) - WORKERS_SHOWN} more")
    return table


def _sample(sample: Record, width: int, room: int) -> RenderableType:
    """Prompt, true answer and as many completions as `room` lines hold, the best and the worst first."""
    completions = [one for one in sample.get("completions") or [] if isinstance(one, dict)]
    ranked = sorted(completions, key=lambda one: -(number(one, "reward") or 0.0))
    lines: list[RenderableType] = [
        Rule(f"sample @{count(number(sample, 'update'))}", style="dim", align="left")
    ]
    prompt = Text("? ", style="bold").append(printable(sample.get("prompt")), style="not bold")
    prompt.append(f"  = {printable(sample.get('answer'))}", style="bold cyan")
    lines.append(_cut(prompt, width, 2))
    left = room - 1 - _lines(lines[-1], width)
    # Two lines each: the start of a completion says what it tries, more would hide the next one.
    for one in _from_both_ends(ranked, left // 2):
        lines.append(_cut(_completion(one), width, 2))
    return Group(*lines)


def _completion(one: Record) -> Text:
    reward = number(one, "reward")
    style = "green" if reward is not None and reward > 0 else "red"
    line = Text(f"{fixed(reward):>5} ", style=style).append(printable(one.get("text")), style="default")
    return line.append(" [cut]", style="yellow") if one.get("truncated") is True else line


def _from_both_ends(ranked: Sequence[Record], places: int) -> list[Record]:
    """`places` of the ranked ones: the upper half from the top, the lower from the bottom, still in order."""
    if places >= len(ranked):
        return list(ranked)
    bottom = places // 2
    return [*ranked[: places - bottom], *ranked[len(ranked) - bottom :]]


def _cut(text: Text, width: int, lines: int) -> Text:
    """`text` without what would not fit into so many lines."""
    cut = text.copy()
    cut.truncate(width * lines - width // 8, overflow="ellipsis")  # words break before the edge
    return cut


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
    # A Text, for a plain string would be read as markup.
    table.add_row(Text(label), value if isinstance(value, Text) else Text(value))


def _beside(*blocks: RenderableType) -> Table:
    row = Table.grid(expand=True, padding=(0, 1))
    for _ in blocks:
        row.add_column(ratio=1)
    row.add_row(*blocks)
    return row


def _spark_room(width: int) -> int:
    """Columns left for a curve in a block, beside its label and its number."""
    return width // (3 if width >= WIDE else 2) - _LABEL_WIDTH - 16


def _with_curve(value: str, curve: Sequence[float | None], room: int, style: str) -> Text:
    return Text(f"{value:13}", style=style).append(sparkline(curve, room), style="not bold")


def _mean_max(mean: str, largest: str) -> str:
    return f"{mean} max {largest}"
