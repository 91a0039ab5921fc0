"""Write to trackio, a local database under ``TRACKIO_DIR``; ``trackio show --project grpo-actors`` opens the page.

trackio cannot discard a step, so if a resumed run repeats updates, their first values stay. trackio's own
environment variables (``TRACKIO_SPACE_ID``, …) apply.
"""

import contextlib
import io
from collections.abc import Mapping

import trackio

from grpo_actors.observe.records import Record
from grpo_actors.trackers import PROJECT, TrackedRun
from grpo_actors.trackers.values import markdown

#: Characters of the run's id in its name, to distinguish runs of one name: trackio identifies a run by its name.
_ID_CHARACTERS = 6


class Trackio:
    """The `Tracker` for trackio."""

    def __init__(self, tracked: TrackedRun) -> None:
        """Start or continue the run of that name."""
        with _quiet():
            self._run = trackio.init(
                project=PROJECT,
                name=f"{tracked.name}-{tracked.run_id[:_ID_CHARACTERS]}",
                config=dict(tracked.hyperparameters),
                resume="allow",
                embed=False,
            )

    def discard_after(self, update: int) -> bool:  # noqa: ARG002
        """Return False: trackio cannot discard steps."""
        return False

    def log(self, update: int, time: float, values: Mapping[str, float]) -> None:  # noqa: ARG002
        """Add one point to each curve."""
        self._run.log(dict(values), step=update)

    def log_sample(self, update: int, time: float, sample: Record) -> None:  # noqa: ARG002
        """Add a text."""
        self._run.log({"samples": trackio.Markdown(markdown(sample))}, step=update)

    def flush(self) -> None:
        """Do nothing: trackio's own thread writes every few tenths of a second."""

    def close(self) -> None:
        """Wait until everything is written."""
        with _quiet():
            trackio.finish()  # not the run's own `finish`, which would be called again at exit


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Suppress trackio's lines of advice, which would mix with the run's own output."""
    return contextlib.redirect_stdout(io.StringIO())
