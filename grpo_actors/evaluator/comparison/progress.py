"""Show the progress of an evaluation on a terminal; show nothing if stderr is no terminal."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

#: Seconds between two updates of the bar; a person reads no faster.
REDRAW_PERIOD_S = 0.1


class Progress:
    """A progress bar of completions, with the tokens decoded so far. It disappears when its block ends."""

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

    def set_total(self, completions: int) -> None:
        """Set the number of completions in all."""
        self._bar.update(self._task, total=completions)

    def set_name(self, text: str) -> None:
        """Set the name of the current candidate."""
        self._bar.update(self._task, description=text)

    def add_tokens(self, tokens: int) -> None:
        """Add to the number of decoded tokens."""
        self._tokens += tokens
        now_s = time.monotonic()
        if now_s - self._drawn_s >= REDRAW_PERIOD_S:
            self._drawn_s = now_s
            self._bar.update(self._task, tokens=self._tokens, refresh=True)

    def add_completions(self, completions: int) -> None:
        """Add to the number of finished completions."""
        self._bar.advance(self._task, completions)
