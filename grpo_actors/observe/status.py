"""Show the supervisor's run: a progress bar and a status line, or plain lines for a log.

On a terminal the bar and the line are redrawn in place, and permanent lines (evaluations, checkpoints, workers that
come and go, alarms, warnings, the end) are printed above them. Before the first update the line says what the run does,
and for how long. Elsewhere the same lines are printed, with the status line at most every `PLAIN_PERIOD_S` seconds.
This module has no socket and starts no thread.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from grpo_actors.observe.records import Record
from grpo_actors.observe.text import (
    bytes_text,
    duration,
    eval_line,
    headcount_line,
    printable,
    status_line,
    stop_line,
)
from grpo_actors.observe.view import RunView, number

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Least seconds between status lines in a log, which is read later.
PLAIN_PERIOD_S = 5.0
#: Least seconds between redraws of a terminal; nobody reads faster.
REDRAW_PERIOD_S = 0.1
#: Least columns of the bar.
_LEAST_BAR = 10


class StatusLine:
    """The supervisor's display: pass every record to `show`, which decides what to print and when."""

    def __init__(
        self,
        total_updates: int | None,
        stream: TextIO | None = None,
        *,
        every_updates: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the display.

        Args:
            total_updates: Planned updates, until a record says otherwise; None: unknown.
            stream: The output; None: stderr.
            every_updates: Show the status at multiples of it, and at the last update.
            clock: Seconds; tests replace it.
        """
        self._every_updates = every_updates
        self._stream = stream or sys.stderr
        self._view = RunView(start={"total_updates": total_updates})
        self._clock = clock
        self._opened_at = clock()
        self._drawn_at = float("-inf")
        #: What the run does before its first update; empty: nothing that is to be shown.
        self._phase = ""
        self._screen = _Screen(self._stream) if self._stream.isatty() else None

    @property
    def view(self) -> RunView:
        """The run as its records have shown it."""
        return self._view

    def show(self, record: Record) -> None:
        """Update the state with one record, and print or redraw where it is time to."""
        note = permanent_note(record, self._view)
        self._view = self._view.apply(record)
        if note is not None:
            self.print_line(*note)
        if record["topic"] == "metrics":
            self._phase = ""
            self._show_status()

    def begin(self, phase: str, *, in_log: bool = True) -> None:
        """Show what the run does from now on, with the time since its start, until its first update or the next phase.

        Args:
            phase: In words, such as ``loading the model``.
            in_log: Whether a log gets a line of it, too.
        """
        if self._view.metrics is not None or phase == self._phase:
            return  # a learner that was started again; the line of the last update stays
        self._phase = phase
        if self._screen is None and in_log:
            print(f"[{self._elapsed}] {phase}", file=self._stream, flush=True)
        self.tick()

    def tick(self) -> None:
        """Draw the time in the phase anew, on a terminal; call it again and again."""
        if self._screen is None or not self._phase:
            return
        now = self._clock()
        if now - self._drawn_at >= REDRAW_PERIOD_S:
            self._drawn_at = now
            self._screen.draw_text(f"{self._elapsed}  {self._phase} …")

    @property
    def _elapsed(self) -> str:
        return duration(self._clock() - self._opened_at)

    def show_preparation(self, text: str) -> None:
        """Show what the run does before its actors start: redraw one line, or print it for a log from time to time.

        An empty text ends the display.
        """
        if self._screen is not None:
            self._screen.draw_text(f"{self._elapsed}  {text}" if text else "")
        elif text and (now := self._clock()) - self._drawn_at >= PLAIN_PERIOD_S:
            self._drawn_at = now
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Close the display and leave its last state visible; may be called twice."""
        if self._screen is not None:
            if self._view.metrics is not None:
                self._screen.draw(self._view, self._elapsed)
            else:
                self._screen.draw_text("")
            self._screen.close()
            self._screen = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show_status(self) -> None:
        now = self._clock()
        update = self._view.update
        last = update == self._view.total_updates
        if update % self._every_updates and not last:
            return
        if now - self._drawn_at < (PLAIN_PERIOD_S if self._screen is None else REDRAW_PERIOD_S) and not last:
            return
        self._drawn_at = now
        if self._screen is not None:
            self._screen.draw(self._view, self._elapsed)
        else:
            print(status_line(self._view), file=self._stream, flush=True)

    def print_line(self, text: str, style: str = "") -> None:
        """Print a permanent line: above the redrawn part, or after the previous lines."""
        if self._screen is not None:
            self._screen.print(text, style)
        else:
            print(text, file=self._stream, flush=True)

    def print_closing(self, facts: Sequence[str], commands: Mapping[str, str]) -> None:
        """Close the display and print a run's last lines, on a terminal in a box: what came out, and what may be done."""
        width = max(map(len, commands), default=0) + 1
        hints = [f"  {f'{label}:':{width}}  {command}" for label, command in commands.items()]
        screen = self._screen
        self.close()  # the bar stays above the box
        if screen is not None:
            screen.print_box(facts)
            for hint in hints:
                screen.print(hint, "")
        else:
            print("\n".join([*facts, *hints]), file=self._stream, flush=True)


def permanent_note(record: Record, before: RunView) -> tuple[str, str] | None:  # noqa: PLR0911 - one per topic
    """Return the permanent line for a record, with its style; None if it has none.

    Args:
        record: The record.
        before: The view before it.
    """
    match record["topic"]:
        case "eval":
            return eval_line(record), "green" if record.get("best") is True else "cyan"
        case "alarm":
            return f"alarm: {printable(record.get('name'))}: {printable(record.get('text'))}", "bold red"
        case "log" if record.get("level") not in ("debug", None):
            level, text = printable(record["level"]), printable(record.get("text"))
            return (text, "dim") if level == "info" else (f"{level}: {text}", "yellow")
        # Every update repeats every worker's state; only a change has a "why".
        case "worker" if record.get("state") == "lost" and "why" in record:
            return f"worker {printable(record.get('worker'))} lost: {printable(record['why'])}", "yellow"
        case "worker" if record.get("state") in ("joined", "left") and record.get("role") != "evaluator":
            return _coming_or_going(record, before)
        case "checkpoint" if number(record, "write_s") is not None:
            name = printable(Path(str(record.get("path"))).name)
            return f"{name} is written, {bytes_text(number(record, 'bytes'))}", "dim"
        case "headcount":
            return headcount_line(record), ""
        case "stop":
            return stop_line(record), "bold"
    return None


def _coming_or_going(record: Record, before: RunView) -> tuple[str, str] | None:
    """Return the line on a worker that has joined or left; none if that is known, or the run is over for all of them."""
    name, state = str(record.get("worker")), record["state"]
    known = before.workers.get(name, {}).get("state")
    is_over = before.total_updates is not None and before.update >= before.total_updates
    if state == known or (state == "left" and is_over):
        return None
    where = f" on {printable(record['device'])}" if state == "joined" and record.get("device") else ""
    return f"worker {printable(name)} {state}{where}", "dim"


class _Screen:
    """The redrawn part of a terminal. rich is imported here because that costs a tenth of a second."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        self._console = Console(file=stream, highlight=False)
        # No refresh thread: the supervisor spawns processes.
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def draw(self, view: RunView, elapsed: str) -> None:
        self._live.update(_bar_and_line(view, elapsed, self._console.width), refresh=True)

    def draw_text(self, text: str) -> None:
        from rich.text import Text  # noqa: PLC0415

        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def print(self, text: str, style: str) -> None:
        # The terminal breaks long lines, not rich: a command in them is to be copied.
        self._console.print(text, style=style, markup=False, soft_wrap=True)

    def print_box(self, lines: Sequence[str]) -> None:
        from rich.panel import Panel  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        self._console.print(
            Panel(Text("\n".join(lines), overflow="fold"), border_style="green", expand=False)
        )

    def close(self) -> None:
        self._live.stop()


def _bar_and_line(view: RunView, elapsed: str, width: int) -> "RenderableType":
    """Build two lines: the bar with the time so far and the time left, then the status line."""
    from rich.console import Group  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    line = Text(status_line(view, width=width), no_wrap=True, overflow="ellipsis")
    if view.total_updates is None:
        return line
    label = f"{100 * view.update / view.total_updates:3.0f} %  {elapsed}, {duration(view.remaining_s)} left"
    bar = ProgressBar(
        total=view.total_updates, completed=view.update, width=max(width - len(label) - 2, _LEAST_BAR)
    )
    row = Table.grid(padding=(0, 1))
    row.add_row(bar, Text(label, style="bold"))
    return Group(row, line)
