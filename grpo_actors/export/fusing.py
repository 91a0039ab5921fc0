"""Load a trained policy without an adapter: the checkpoint's full weights, or its base with the adapter merged in.

The merge is permanent. It is computed in float32 and rounded once, to the type or the bits of the result. `policy.adapter.fused` is a worker's temporary merge for one batch.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.casting import cast, float_dtype
from grpo_actors.policy.model import AS_STORED, DTYPES, Policy, load_base
from grpo_actors.policy.quantization import is_quantized
from grpo_actors.rundir.checkpoint_weights import check_adapter, is_adapter, load_whole


def load_fused(checkpoint: Path, config: ModelConfig, *, dequantize: bool, dtype: str | None) -> Policy:
    """Load the policy of a checkpoint, with its adapter, if it has one, merged into the weights.

    Args:
        checkpoint: The checkpoint's folder.
        config: Section [model] of the run.
        dequantize: Unpack a quantised base, so that the sum with the adapter is not rounded to few bits again.
        dtype: Type of the weights; None keeps the type of the checkpoint, or of the base as stored.

    Raises:
        ModelError: base or adapter is unusable, or `dtype` is given for quantised weights.
    """
    if not is_adapter(checkpoint):
        policy = load_whole(checkpoint, config, dtype=AS_STORED)
    else:
        check_adapter(checkpoint, config)
        policy = load_base(config, dtype=AS_STORED)
    quantized = is_quantized(policy.model)
    if dtype is not None and quantized and not dequantize:
        raise ModelError(f"--dtype {dtype}: the weights are quantised; add --dequantize")
    stored, types = DTYPES[float_dtype(policy.model)], _float_types(policy.model)
    if dequantize or (is_adapter(checkpoint) and not quantized):
        cast(policy.model, mx.float32)  # scales in float32 unpack exactly
        policy.model = mlx_lm.utils.dequantize_model(policy.model)
        cast(policy.model, mx.float32)  # some packings unpack to bfloat16, which would round the sum
    if is_adapter(checkpoint):
        _fuse(policy.model, checkpoint)
    if dtype is not None:
        cast(policy.model, DTYPES[dtype])
    else:
        own = {name: types.get(name, stored) for name in _float_types(policy.model)}
        floats = dict(tree_flatten(policy.model.parameters()))
        policy.model.update(tree_unflatten([(name, floats[name].astype(own[name])) for name in own]))
    policy.architecture = _architecture(policy)
    mx.eval(policy.model.parameters())
    return policy


def _float_types(model: nn.Module) -> dict[str, mx.Dtype]:
    """Return the type of each array of floats by name."""
    arrays = tree_flatten(model.parameters())
    return {name: array.dtype for name, array in arrays if mx.issubdtype(array.dtype, mx.floating)}


def _fuse(model: nn.Module, checkpoint: Path) -> None:
    load_adapters(model, str(checkpoint))
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))


def _architecture(policy: Policy) -> dict[str, Any]:
    """Return the model's config.json with the quantisation that its weights have now, if any."""
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
    # The most common settings are the default; mlx-lm looks up the exceptions by module name.
    settings = list(packed.values())
    common = max(settings, key=settings.count)
    exceptions = {name: own for name, own in packed.items() if own != common}
    return architecture | {"quantization": {**common, **exceptions}}
