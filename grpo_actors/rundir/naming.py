"""What a user may name as a model: a hub id, a model folder, a checkpoint, an adapter, a whole run.

Knows where weights lie and what they are; refuses to know what the policy is wanted for.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import xxhash
from pydantic import ValidationError

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.model import Policy, load_base, load_policy
from grpo_actors.rundir.checkpoint_weights import ADAPTER, ADAPTER_CONFIG, is_adapter, load_weights
from grpo_actors.rundir.checkpoints import Checkpoint, best, find_checkpoints, newest_sound, verify
from grpo_actors.rundir.folder import METRICS_FILE


def checkpoints_of(folder: Path) -> list[Checkpoint]:
    """Those of a run, oldest first; none: the folder is no run's.

    Raises:
        ModelError: it is a run's, and has none yet.
    """
    found = find_checkpoints(folder)
    if not found and (folder / METRICS_FILE).is_file():
        raise ModelError(f"{folder}: a run without a checkpoint yet")
    return found


def resolve(name: str) -> str:
    """A hub id as it is, a folder by its path from the root; of a run its best checkpoint, before any score its newest.

    Raises:
        ModelError: the run has no sound checkpoint.
        RunError: its best.json is unreadable.
    """
    if not Path(name).expanduser().is_dir():
        return name
    folder = Path(name).expanduser().resolve()
    if not checkpoints_of(folder):
        return str(folder)
    marked = best(folder)
    if marked is not None:
        checkpoint = Checkpoint(folder / marked["checkpoint"], marked["update"])
        complaint = verify(checkpoint)
        if complaint is not None:
            raise ModelError(f"{complaint}; it is the run's best checkpoint, name another one")
        return str(checkpoint.path)
    newest, complaints = newest_sound(folder)
    if newest is None:
        raise ModelError(complaints[0])
    return str(newest.path)


def open_policy(model: str | None, adapter: str | None = None) -> Policy:
    """The policy of a model, of an adapter on the base that it names, or of `adapter` on the base `model`.

    Args:
        model: As `resolve` returns it; may be None beside an adapter.
        adapter: A folder in mlx-lm's format.

    Raises:
        ModelError: there is nothing usable.
        ConfigError: the adapter does not fit its base.
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
    load_weights(folder, policy)
    return policy


def weights_digest(policy: Policy) -> str:
    """Of the base, as workers compare it, and of every value of an adapter."""
    digest = xxhash.xxh3_64(policy.identity.weights.encode())
    if policy.has_adapter:
        for name, array in sorted(policy.trainable().items()):
            digest.update(name.encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def adapter_settings(folder: Path, base: str | None) -> ModelConfig:
    """Section [model] as an adapter's own description gives it, on another `base` if one is named.

    Raises:
        ModelError: it is no adapter, or nothing says how it is to be put on.
    """
    for file in (ADAPTER, ADAPTER_CONFIG):
        if not (folder / file).is_file():
            raise ModelError(f"{folder}: no adapter folder ({file} not found)")
    try:
        described = json.loads((folder / ADAPTER_CONFIG).read_text())
        parameters = described["lora_parameters"]
        return ModelConfig.model_validate(
            {
                "model_name": base or described["model"],
                "fine_tune_type": described.get("fine_tune_type", "lora"),  # as mlx-lm reads it
                "base_bits": described.get("base_quantization", {}).get("bits", 0),
                "lora_layers": described["num_layers"],
                "lora_rank": parameters["rank"],
                "lora_scale": parameters["scale"],
                "lora_dropout": parameters.get("dropout", 0.0),
                "lora_keys": parameters.get("keys") or (),
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModelError(f"{folder / ADAPTER_CONFIG}: does not describe an adapter: {what}") from error
