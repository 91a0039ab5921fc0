"""Weights & Biases: offline where there is no API key, as ``WANDB_MODE`` says where that is set.

An offline run lies in ``RUN_DIR/trackers/wandb``; ``wandb sync`` brings it to the server later. W&B takes no step
back, so that of updates that are told twice the first telling stays. Its own variables (``WANDB_PROJECT``,
``WANDB_ENTITY``, …) hold.
"""

import os
from collections.abc import Mapping
from typing import Literal

import wandb
from wandb.errors import UsageError

from grpo_actors.observe.records import Record
from grpo_actors.observe.trackers import PROJECT, Tracked

_SAMPLE_COLUMNS = ["update", "problem", "prompt", "answer", "completion", "reward", "truncated"]


class WeightsAndBiases:
    """A `Tracker`."""

    def __init__(self, tracked: Tracked) -> None:
        """Begin, or go on with, the run that has our run's id."""
        tracked.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = _init(tracked)
        except UsageError:
            if "WANDB_MODE" in os.environ:
                raise
            self._run = _init(tracked, mode="offline")  # there is no API key
        # Not W&B's own step, which may not fall: an evaluation comes when later updates have been told.
        self._run.define_metric("*", step_metric="update")

    def forget_after(self, update: int) -> bool:  # noqa: ARG002
        """It cannot."""
        return False

    def log(self, update: int, time: float, values: Mapping[str, float]) -> None:  # noqa: ARG002
        """Add one point to each curve."""
        self._run.log({"update": update, **values})

    def show(self, update: int, time: float, sample: Record) -> None:  # noqa: ARG002
        """Add a table with a row a completion."""
        rows = [
            [update, sample["problem"], sample["prompt"], str(sample["answer"])]
            + [completion[key] for key in ("text", "reward", "truncated")]
            for completion in sample["completions"]
        ]
        self._run.log({"update": update, "samples": wandb.Table(columns=_SAMPLE_COLUMNS, data=rows)})

    def flush(self) -> None:
        """Its own process writes what it was given."""

    def close(self) -> None:
        """Wait for what is still to be written or sent."""
        self._run.finish()


def _init(tracked: Tracked, mode: Literal["offline"] | None = None) -> wandb.Run:
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=tracked.run_id,
        name=tracked.name,
        dir=tracked.folder,
        config=dict(tracked.hyperparameters),
        resume="allow",
        mode=mode,
        settings=wandb.Settings(console="off", silent=True),
    )
