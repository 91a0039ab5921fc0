"""Define what a tracker is: an external program that stores and compares the curves of runs.

This module has the `Tracker` protocol and the list of trackers. Each tracker has its own module, the only one
that imports its package. `values` decides which fields of a record are sent, and under which names.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from grpo_actors.config.schema import TrackerName
from grpo_actors.errors import ConfigError
from grpo_actors.observe.records import Record

#: Project name of the runs, for trackers that have projects.
PROJECT = "grpo-actors"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as it is described to a tracker."""

    #: The tracker's folder in the run folder; it may not exist yet.
    folder: Path
    name: str
    #: The same for a run and all its resumptions.
    run_id: str
    #: Unix seconds.
    started: float
    #: The settings by dotted name: numbers, booleans and strings.
    hyperparameters: Mapping[str, Any]
    #: The newest update that an earlier process sent to the tracker; None: nothing yet.
    sent_update: int | None


class Tracker(Protocol):
    """One open run of one tracker. A step is the number of an update, or of the update that was evaluated.

    Any method may raise what its package raises: that ends the process, and the next process continues.
    """

    def discard_after(self, update: int) -> bool:
        """Discard steps after `update`, from whose checkpoint the run continues.

        False: the tracker cannot. Then its steps stay, and those updates are not sent again.
        """
        ...

    def log(self, update: int, time: float, values: Mapping[str, float]) -> None:
        """Send numbers by name; `time` of their record in Unix seconds."""
        ...

    def log_sample(self, update: int, time: float, sample: Record) -> None:
        """Send one problem with its completions."""
        ...

    def flush(self) -> None:
        """Return once a kill of this process would lose nothing, as far as the package can ensure that."""
        ...

    def close(self) -> None:
        """Close the tracker: the run or this process ends."""
        ...


def check_installed(trackers: tuple[str, ...]) -> None:
    """Check that every tracker is known and its package is installed.

    Raises:
        ConfigError: one is not; the text has the known names, or the command that installs the package.
    """
    for name in trackers:
        if name not in get_args(TrackerName):
            raise ConfigError(f"a tracker must be one of {', '.join(get_args(TrackerName))}, got {name}")
        spec = importlib.util.find_spec(name)
        # Without an origin it is not a package but a folder of that name, such as the one where wandb stores files.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"metrics.trackers: \"{name}\" is not installed; pip install 'grpo-actors[{name}]', or leave it out"
            )


def open_tracker(name: str, tracked: TrackedRun) -> Tracker:
    """Open a run of the tracker `name`, new or continued from an earlier process."""
    # Each package takes a second or more to import, and a process needs only one.
    if name == "tensorboard":
        from grpo_actors.trackers.tensorboard import TensorBoard  # noqa: PLC0415

        return TensorBoard(tracked)
    if name == "wandb":
        from grpo_actors.trackers.wandb import WeightsAndBiases  # noqa: PLC0415

        return WeightsAndBiases(tracked)
    from grpo_actors.trackers.trackio import Trackio  # noqa: PLC0415

    return Trackio(tracked)
