"""Load what a user names as a model: a hub id, a model folder, a checkpoint, an adapter, or a whole run.

Depends on where weights are stored and what they are, not on what the policy is used for.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import xxhash
from pydantic import ValidationError

from grpo_actors.config import ModelConfig
from grpo_actors.config.adapter_folder import ADAPTER_CONFIG, read_adapter
from grpo_actors.errors import ModelError
from grpo_actors.policy.model import Policy, load_base, load_policy
from grpo_actors.policy.tokenizer_files import TEMPLATE
from grpo_actors.rundir.checkpoint_weights import is_adapter
from grpo_actors.rundir.checkpoints import (
    Checkpoint,
    best_checkpoint,
    find_checkpoints,
    newest_sound,
    verify,
)
from grpo_actors.rundir.folder import METRICS_FILE


def checkpoints_of(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run, oldest first; an empty list if the folder is no run folder.

    Raises:
        ModelError: It is a run folder without a checkpoint.
    """
    found = find_checkpoints(folder)
    if not found and (folder / METRICS_FILE).is_file():
        raise ModelError(f"{folder}: a run without a checkpoint yet")
    return found


def resolve(name: str) -> str:
    """Return a hub id unchanged, a folder's absolute path, or the path of a run's best checkpoint.

    Before the first score, and if no checkpoint beat the base model, the newest checkpoint that verifies stands for the run.

    Raises:
        ModelError: The run has no checkpoint that verifies, or its best one is damaged.
        RunError: The run's best.json is unreadable.
    """
    if not Path(name).expanduser().is_dir():
        return name
    folder = Path(name).expanduser().resolve()
    if not checkpoints_of(folder):
        return str(folder)
    checkpoint = best_checkpoint(folder)
    if checkpoint is not None:
        fault = verify(checkpoint)
        if fault is not None:
            raise ModelError(f"{fault}; it is the run's best checkpoint, name another one")
        return str(checkpoint.path)
    newest, faults = newest_sound(folder)
    if newest is None:
        raise ModelError(faults[0])
    return str(newest.path)


def open_policy(model: str | None, adapter: str | None = None) -> Policy:
    """Load a model, an adapter on the base that it names, or `adapter` on the base `model`.

    Args:
        model: A name as returned by `resolve`; may be None if `adapter` is given.
        adapter: An adapter folder, mlx-lm's or PEFT's.

    Raises:
        ModelError: The name or folder holds nothing usable.
        ConfigError: The adapter does not fit its base.
    """
    if adapter is None:
        assert model is not None
        folder = Path(model).expanduser()
        if not is_adapter(folder):
            return load_base(ModelConfig(model_name=model))
        model = None
    else:
        folder = Path(adapter).expanduser()
    policy = load_policy(adapter_settings(folder, model), seed=0)
    if (folder / TEMPLATE).is_file():
        policy.chat.use((folder / TEMPLATE).read_text("utf-8"))
    return policy


def weights_digest(policy: Policy) -> str:
    """Return a digest of the base (the one that workers compare) and of every value of an adapter."""
    digest = xxhash.xxh3_64(policy.identity.weights.encode())
    if policy.has_adapter:
        for name, array in sorted(policy.trainable().items()):
            digest.update(name.encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def adapter_settings(folder: Path, base: str | None) -> ModelConfig:
    """Build section [model] from an adapter's own description, with another `base` if one is named.

    Raises:
        ModelError: The folder is no adapter, or its description is missing or unusable.
    """
    settings = read_adapter(folder).settings
    if base is None and "model_name" not in settings:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: does not name its base model; name it")
    named = {"model_name": base} if base else {}
    try:
        return ModelConfig.model_validate({**settings, **named, "adapter_path": str(folder)})
    except ValidationError as error:
        what = " ".join(str(error).split())
        raise ModelError(f"{folder / ADAPTER_CONFIG}: does not describe an adapter: {what}") from error
