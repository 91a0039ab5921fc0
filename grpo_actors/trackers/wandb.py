"""Write to Weights & Biases: offline if there is no API key, or as ``WANDB_MODE`` says if it is set.

An offline run is stored in ``RUN_DIR/trackers/wandb``; ``wandb sync`` uploads it later. W&B cannot discard a step, so
if a resumed run repeats updates, their first values stay. W&B's own environment variables (``WANDB_PROJECT``,
``WANDB_ENTITY``, …) apply.
"""

import os
from collections.abc import Mapping
from typing import Literal

import wandb
from wandb.errors import UsageError

from grpo_actors.observe.records import Record
from grpo_actors.trackers import PROJECT, TrackedRun

_SAMPLE_COLUMNS = ["update", "problem", "prompt", "answer", "completion", "reward", "truncated"]


class WeightsAndBiases:
    """The `Tracker` for Weights & Biases."""

    def __init__(self, tracked: TrackedRun) -> None:
        """Start or continue the W&B run whose id is our run's id."""
        tracked.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = _init(tracked)
        except UsageError:
            if "WANDB_MODE" in os.environ:
                raise
            self._run = _init(tracked, mode="offline")  # there is no API key
        # Not W&B's own step, which must not decrease: an evaluation arrives after metrics of later updates.
        self._run.define_metric("*", step_metric="update")

    def discard_after(self, update: int) -> bool:  # noqa: ARG002
        """Return False: W&B cannot discard steps."""
        return False

    def log(self, update: int, time: float, values: Mapping[str, float]) -> None:  # noqa: ARG002
        """Add one point to each curve."""
        self._run.log({"update": update, **values})

    def log_sample(self, update: int, time: float, sample: Record) -> None:  # noqa: ARG002
        """Add a table with one row per completion."""
        rows = [
            [update, sample["problem"], sample["prompt"], str(sample["answer"])]
            + [completion[key] for key in ("text", "reward", "truncated")]
            for completion in sample["completions"]
        ]
        self._run.log({"update": update, "samples": wandb.Table(columns=_SAMPLE_COLUMNS, data=rows)})

    def flush(self) -> None:
        """Do nothing: W&B's own process writes."""

    def close(self) -> None:
        """Wait until everything is written or sent."""
        self._run.finish()


def _init(tracked: TrackedRun, mode: Literal["offline"] | None = None) -> wandb.Run:
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
