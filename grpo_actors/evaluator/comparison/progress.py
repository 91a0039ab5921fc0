"""How far an evaluation is, on a terminal; nothing elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

#: A screen is read by a person, and not faster than this.
REDRAW_PERIOD_S = 0.1


class Progress:
    """A bar of completions, and the tokens decoded so far. Gone when it is left."""

    def __init__(self) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("completions, {task.fields[tokens]:,} tokens,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, tokens=0)
        self._tokens = 0
        self._drawn_s = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, completions: int) -> None:
        """So many completions in all."""
        self._bar.update(self._task, total=completions)

    def name(self, text: str) -> None:
        """Who is answering."""
        self._bar.update(self._task, description=text)

    def decoded(self, tokens: int) -> None:
        """So many more tokens."""
        self._tokens += tokens
        now_s = time.monotonic()
        if now_s - self._drawn_s >= REDRAW_PERIOD_S:
            self._drawn_s = now_s
            self._bar.update(self._task, tokens=self._tokens, refresh=True)

    def finished(self, completions: int) -> None:
        """So many more completions."""
        self._bar.advance(self._task, completions)
