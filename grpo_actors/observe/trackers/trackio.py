"""trackio: a local data base under ``TRACKIO_DIR``; ``trackio show --project grpo-actors`` opens the page.

A step of it cannot be taken back, so that of updates that are told twice the first telling stays. Its own variables
(``TRACKIO_SPACE_ID``, …) hold.
"""

import contextlib
import io
from collections.abc import Mapping

import trackio

from grpo_actors.observe.records import Record
from grpo_actors.observe.trackers import PROJECT, Tracked
from grpo_actors.observe.trackers.values import markdown

#: Of a run's id, enough to tell runs of one name apart: trackio knows a run by its name.
_ID_CHARACTERS = 6


class Trackio:
    """A `Tracker`."""

    def __init__(self, tracked: Tracked) -> None:
        """Begin, or go on with, the run of that name."""
        with _quiet():
            self._run = trackio.init(
                project=PROJECT,
                name=f"{tracked.name}-{tracked.run_id[:_ID_CHARACTERS]}",
                config=dict(tracked.hyperparameters),
                resume="allow",
                embed=False,
            )

    def forget_after(self, update: int) -> bool:  # noqa: ARG002
        """It cannot."""
        return False

    def log(self, update: int, time: float, values: Mapping[str, float]) -> None:  # noqa: ARG002
        """Add one point to each curve."""
        self._run.log(dict(values), step=update)

    def show(self, update: int, time: float, sample: Record) -> None:  # noqa: ARG002
        """Add a text."""
        self._run.log({"samples": trackio.Markdown(markdown(sample))}, step=update)

    def flush(self) -> None:
        """Its own thread writes every few tenths of a second what it was given."""

    def close(self) -> None:
        """Wait for what is still to be written."""
        with _quiet():
            trackio.finish()  # the run's own `finish` would be called once more at exit


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Swallow the lines of advice, which would stand between the run's own."""
    return contextlib.redirect_stdout(io.StringIO())
