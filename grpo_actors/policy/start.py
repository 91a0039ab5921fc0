"""Start from an adapter: train it on, or add it to the weights and train those.

What a policy holds then is its start, and so the reference of the KL term.
"""

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo_actors.config import ModelConfig
from grpo_actors.config.adapter_folder import AdapterFolder, check_start
from grpo_actors.errors import ModelError
from grpo_actors.policy.adapter import add_adapter
from grpo_actors.policy.peft import from_peft


def load_adapter_start(model: nn.Module, config: ModelConfig) -> None:
    """Give the model's new adapter the values of the one in `config.adapter_path`.

    Raises:
        ModelError: the folder is unusable, or its adapter does not fit the model.
        ConfigError: the settings describe another adapter.
    """
    found = check_start(config)
    _load(model, _arrays(found, model, config), dict(tree_flatten(model.trainable_parameters())), found)


def merge_adapter_start(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Add the adapter in `config.adapter_path` to the unquantised weights, in their own type.

    Raises:
        ModelError: as `load_adapter_start`.
        ConfigError: the adapter's settings do not fit this model.
    """
    found = check_start(config)
    if found.kind == "full":
        given = _read(found)
        held = dict(tree_flatten(model.parameters()))
        _load(model, given, {name: held[name] for name in given if name in held}, found)
        return
    own = {key: value for key, value in found.settings.items() if key not in ("model_name", "base_bits")}
    adapted = config.model_copy(update=own)
    add_adapter(model, adapted, seed)
    load_adapter_start(model, adapted)
    merged = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(merged))


def _arrays(found: AdapterFolder, model: nn.Module, config: ModelConfig) -> dict[str, mx.array]:
    stored = _read(found)
    if found.peft is None:
        return stored
    try:
        return from_peft(found.peft, stored, model, config.lora_rank, config.lora_scale)
    except ModelError as error:
        raise ModelError(f"model.adapter_path: {found.path}: {error}") from None
    except KeyError as error:
        raise ModelError(f"model.adapter_path: {found.weights} has no {error}") from None


def _read(found: AdapterFolder) -> dict[str, mx.array]:
    try:
        stored = mx.load(str(found.weights))
    except RuntimeError as error:
        raise ModelError(f"{found.weights}: not a readable safetensors file: {error}") from error
    assert isinstance(stored, dict)
    return stored


def _load(
    model: nn.Module, given: dict[str, mx.array], wanted: dict[str, mx.array], found: AdapterFolder
) -> None:
    """Replace all arrays that are wanted, or none."""
    where = f"model.adapter_path: {found.weights}"
    if odd := sorted(given.keys() ^ wanted.keys()):
        side = "the model has no such array" if odd[0] in given else "it is missing"
        raise ModelError(f"{where} does not fit the model: {odd[0]}: {side}")
    for name, array in wanted.items():
        if given[name].shape != array.shape:
            raise ModelError(
                f"{where} does not fit the model: {name} is {given[name].shape}, not {array.shape}"
            )
    model.update(tree_unflatten([(name, given[name].astype(array.dtype)) for name, array in wanted.items()]))
