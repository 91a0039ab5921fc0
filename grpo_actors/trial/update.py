"""Do the update of a trial, and measure it as a run would meet it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.grpo import Grpo

#: Seconds of the first update up to which it is done again: the first one also compiles and sees new shapes.
REPEATED_S = 15.0


@dataclass(frozen=True, slots=True)
class Update:
    """One update on the groups of a trial."""

    #: Of the first update, in which the policy is still the one that sampled.
    metrics: Mapping[str, Any]
    #: Seconds of the last one.
    seconds: float
    #: Peak of MLX's memory, sampling included.
    peak_bytes: int


def try_update(grpo: Grpo, groups: Sequence[SampledGroup]) -> Update:
    """Update the policy on the groups, twice if it is fast. What the policy becomes is of no use."""
    metrics, seconds = _timed(grpo, groups)
    if seconds <= REPEATED_S:
        _, seconds = _timed(grpo, groups)
    return Update(metrics, seconds, mx.get_peak_memory())


def _timed(grpo: Grpo, groups: Sequence[SampledGroup]) -> tuple[Mapping[str, Any], float]:
    started_s = time.monotonic()
    metrics = grpo.update(groups)
    return metrics, time.monotonic() - started_s
