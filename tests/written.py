"""Write a checkpoint at once, for tests of what reads it."""

from pathlib import Path
from typing import Any

from checkpoint_files import STATE

from grpo_actors.policy.model import Policy
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoint_weights import freeze_checkpoint
from grpo_actors.rundir.checkpoints import Checkpoint


def write_checkpoint(
    run_dir: Path, update: int, policy: Policy, training: Training, state: dict[str, Any], **more: Any
) -> Checkpoint:
    """Write checkpoint-`update` with fields of `STATE`; `more`: arguments of `freeze_checkpoint`."""
    return freeze_checkpoint(update, policy, training, STATE | state, **more).write(run_dir)
