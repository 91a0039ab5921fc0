"""Trackers: other programs' pages on which a run's curves are kept and compared.

Here: what a tracker can be asked, and which there are. Each has a module of its own, the only one that imports
its package; what of a record is told, and how it is named, is in `values`.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from grpo_actors.config.schema import TrackerName
from grpo_actors.errors import ConfigError
from grpo_actors.observe.records import Record

#: Under which the trackers that know projects file the runs.
PROJECT = "grpo-actors"


@dataclass(frozen=True, slots=True)
class Tracked:
    """The run as a tracker presents it."""

    #: The tracker's own in the run folder, which may not be there yet.
    folder: Path
    name: str
    #: Of this run and all its resumptions.
    run_id: str
    #: Unix seconds.
    started: float
    #: The settings by dotted name: numbers, truth values and texts.
    hyperparameters: Mapping[str, Any]
    #: The newest update that the tracker has been given by an earlier process; None: nothing yet.
    given_update: int | None


class Tracker(Protocol):
    """One open run of one tracker. A step is an update's number, or that of the update that was evaluated.

    Any method may raise what its package raises: the process ends with it, and the next one goes on.
    """

    def forget_after(self, update: int) -> bool:
        """The run goes on from the checkpoint of `update`; False: what is there stays, and is not told again."""
        ...

    def log(self, update: int, time: float, values: Mapping[str, float]) -> None:
        """Numbers by name, and when they were told, in Unix seconds."""
        ...

    def show(self, update: int, time: float, sample: Record) -> None:
        """One problem with its completions."""
        ...

    def flush(self) -> None:
        """Return once a kill of this process would lose nothing, as far as the package can tell."""
        ...

    def close(self) -> None:
        """The run is over, or this process is."""
        ...


def check_installed(trackers: tuple[str, ...]) -> None:
    """Refuse a tracker that is not known, or whose package is not there.

    Raises:
        ConfigError: has the names, or the command that installs the package.
    """
    for name in trackers:
        if name not in get_args(TrackerName):
            raise ConfigError(f"a tracker must be one of {', '.join(get_args(TrackerName))}, got {name}")
        spec = importlib.util.find_spec(name)
        # Without an origin it is no package but a folder of that name, such as the one where wandb keeps its files.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"metrics.trackers: \"{name}\" is not installed; pip install 'grpo-actors[{name}]', or leave it out"
            )


def open_tracker(name: str, tracked: Tracked) -> Tracker:
    """Open a run of the tracker `name`, new or where an earlier process left it."""
    # Each package takes a second or more to import, and only one is needed in a process.
    if name == "tensorboard":
        from grpo_actors.observe.trackers.tensorboard import TensorBoard  # noqa: PLC0415

        return TensorBoard(tracked)
    if name == "wandb":
        from grpo_actors.observe.trackers.wandb import WeightsAndBiases  # noqa: PLC0415

        return WeightsAndBiases(tracked)
    from grpo_actors.observe.trackers.trackio import Trackio  # noqa: PLC0415

    return Trackio(tracked)
