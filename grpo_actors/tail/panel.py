"""Draw the whole view of a run on a terminal: turn a `RunView` into rich renderables that fit width and height.

Numbers come first; completions take the lines that are left. This module reads no records and no clock:
`now` is an argument. It imports rich, so it is imported late.
"""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from grpo_actors.observe.records import Record
from grpo_actors.observe.text import count, duration, fixed, pace, printable, progress, stop_line
from grpo_actors.observe.view import RunView, number
from grpo_actors.tail.tables import evaluation, learning, rollout, workers

#: From this many columns on, blocks are placed three in a row.
WIDE = 110
#: From this many lines on, blank lines separate the parts.
TALL = 32
#: Seconds without a record after which the header shows the length of the silence.
SILENCE_S = 10.0


def panel(view: RunView, width: int, height: int, silent_s: float) -> RenderableType:
    """Draw the view in at most `height` lines; `silent_s`: seconds since the last record arrived."""
    columns = 3 if width >= WIDE else 2
    block_width = width // columns - 1
    blocks = [block(view, block_width) for block in (learning, rollout, evaluation, workers)]
    parts: list[RenderableType] = [_header(view, width, silent_s), *_notes(view)]
    gap = [Text()] if height >= TALL else []
    parts += gap
    if columns == 3:
        parts.append(_side_by_side(blocks[0], blocks[1], Group(blocks[2], Text(), blocks[3])))
    else:
        parts += [_side_by_side(blocks[0], blocks[1]), *gap, _side_by_side(blocks[2], blocks[3])]
    parts += gap
    lines_left = height - _lines(Group(*parts), width)
    if view.sample is not None and lines_left >= 3:
        parts.append(_sample(view.sample, width, lines_left))
    return Group(*parts)


def _lines(renderable: RenderableType, width: int) -> int:
    console = Console(width=width, height=200, force_terminal=False)
    return len(console.render_lines(renderable, pad=False))


def _header(view: RunView, width: int, silent_s: float) -> RenderableType:
    """Draw two lines: which run and its state, then its progress."""
    start = view.start or {}
    names = [printable(start[key]) for key in ("run_name", "model_name") if start.get(key)]
    policy = number(view.policy, "version")
    title = Text(" · ".join(names or ["run"]), style="bold", no_wrap=True, overflow="ellipsis")
    if policy is not None:
        title.append(f" · policy v{policy:.0f}", style="not bold dim")
    row = Table.grid(expand=True)
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    row.add_row(title, _state(view, silent_s))
    facts = f"{progress(view)} updates  {pace(view.updates_per_s)}"
    if view.total_updates is None:
        return Group(row, Text(facts))
    facts += f"  {duration(view.remaining_s)} left"
    bar = ProgressBar(total=view.total_updates, completed=view.update, width=max(width - len(facts) - 2, 10))
    below = Table.grid(padding=(0, 2))
    below.add_row(bar, facts)
    return Group(row, below)


def _state(view: RunView, silent_s: float) -> Text:
    if view.stop is not None:
        failed = bool(number(view.stop, "exit_code"))
        return Text(stop_line(view.stop), style="bold red" if failed else "bold green")
    if view.time is None:
        return Text("waiting for the first event", style="yellow")
    if silent_s > SILENCE_S:
        return Text(f"silent for {duration(silent_s)}", style="yellow")
    return Text("running", style="green")


def _notes(view: RunView) -> list[RenderableType]:
    """Draw the two newest alarms, one line each."""
    return [
        Text(
            f"! {printable(alarm.get('name'))}: {printable(alarm.get('text'))}",
            style="bold red",
            no_wrap=True,
            overflow="ellipsis",
        )
        for alarm in view.alarms[-2:]
    ]


def _sample(sample: Record, width: int, height: int) -> RenderableType:
    """Draw prompt, true answer and the best and worst completions that fit in `height` lines."""
    completions = [one for one in sample["completions"] if isinstance(one, dict)]
    ranked = sorted(completions, key=lambda one: -(number(one, "reward") or 0.0))
    lines: list[RenderableType] = [
        Rule(f"sample @{count(number(sample, 'update'))}", style="dim", align="left")
    ]
    prompt = Text("? ", style="bold").append(printable(sample.get("prompt")), style="not bold")
    prompt.append(f"  = {printable(sample.get('answer'))}", style="bold cyan")
    # At most two lines each: the start shows the approach, and more would push out the next one.
    lines_each = 1 if height < 10 else 2
    lines.append(_cut(prompt, width, lines_each))
    left = height - 1 - _lines(lines[-1], width)
    lines += [
        _cut(_completion(one), width, lines_each) for one in _from_both_ends(ranked, left // lines_each)
    ]
    return Group(*lines)


def _completion(one: Record) -> Text:
    reward = number(one, "reward")
    style = "green" if reward is not None and reward > 0 else "red"
    line = Text(f"{fixed(reward):>5} ", style=style).append(printable(one.get("text")), style="default")
    return line.append(" [cut]", style="yellow") if one.get("truncated") is True else line


def _from_both_ends(ranked: Sequence[Record], kept: int) -> list[Record]:
    """Return `kept` of the ranked records, half from the top and half from the bottom, still in order."""
    if kept >= len(ranked):
        return list(ranked)
    bottom = kept // 2
    return [*ranked[: kept - bottom], *ranked[len(ranked) - bottom :]]


def _cut(text: Text, width: int, lines: int) -> Text:
    """Return `text`, cut so that it fits in `lines` lines of `width` columns."""
    cut = text.copy()
    # Lines break between words, so a line is often a little shorter than `width`.
    cut.truncate(width * lines - (width // 8 if lines > 1 else 0), overflow="ellipsis")
    return cut


def _side_by_side(*blocks: RenderableType) -> Table:
    row = Table.grid(expand=True, padding=(0, 1))
    for _ in blocks:
        row.add_column(ratio=1)
    row.add_row(*blocks)
    return row
