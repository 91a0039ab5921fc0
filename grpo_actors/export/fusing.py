"""A trained policy as one model folder: the checkpoint's own weights, or its adapter added to the base.

For good, and in the base's own type; what a worker does for the length of a batch is `adapter.fused`.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.model import AS_STORED, DTYPES, Policy, load_base
from grpo_actors.policy.quantization import is_quantized
from grpo_actors.rundir.checkpoint_weights import check_adapter, is_adapter


def load_fused(checkpoint: Path, config: ModelConfig, *, dequantize: bool, dtype: str | None) -> Policy:
    """The policy of a checkpoint without an adapter beside it.

    Args:
        checkpoint: Its folder.
        config: Section [model] of the run.
        dequantize: Unpack a quantised base, so that the sum with the adapter is not rounded to its bits again.
        dtype: Of the weights; None: as the checkpoint, or the base, has them.

    Raises:
        ModelError: base or adapter is unusable, or `dtype` is asked of quantised weights.
    """
    if not is_adapter(checkpoint):
        whole = config.model_copy(update={"model_name": str(checkpoint), "base_bits": 0})
        policy = load_base(whole, dtype=AS_STORED)
    else:
        check_adapter(checkpoint, config)
        policy = load_base(config, dtype=AS_STORED)
        _fuse(policy.model, checkpoint, dequantize=dequantize)
    if dequantize:
        policy.model = mlx_lm.utils.dequantize_model(policy.model)
    if dtype is not None:
        if is_quantized(policy.model):
            raise ModelError(f"--dtype {dtype}: the weights are quantised; add --dequantize")
        policy.model.set_dtype(DTYPES[dtype])
    policy.architecture = _described(policy)
    mx.eval(policy.model.parameters())
    return policy


def _fuse(model: nn.Module, checkpoint: Path, *, dequantize: bool) -> None:
    load_adapters(model, str(checkpoint))
    fused = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    ]
    model.update_modules(tree_unflatten(fused))


def _described(policy: Policy) -> dict[str, Any]:
    """The config.json of the model as it is now: packed in which groups and bits, or not at all."""
    architecture = {
        key: value
        for key, value in policy.architecture.items()
        if key not in ("quantization", "quantization_config")
    }
    packed = {
        name: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for name, module in policy.model.named_modules()
        if "scales" in module
    }
    if not packed:
        return architecture
    # What most modules have stands for all; mlx-lm looks for the others by name.
    settings = list(packed.values())
    common = max(settings, key=settings.count)
    others = {name: own for name, own in packed.items() if own != common}
    return architecture | {"quantization": {**common, **others}}
