"""Read an adapter folder as settings of section [model]: mlx-lm's kinds of adapters, and PEFT's. Loads no array.

Both call their description adapter_config.json; the name of the file with the arrays tells them apart.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_actors.config.peft_folder import PEFT_WEIGHTS, PeftAdapter, read_peft
from grpo_actors.config.schema import ModelConfig
from grpo_actors.errors import ConfigError, ModelError

ADAPTER_CONFIG = "adapter_config.json"
MLX_LM_WEIGHTS = "adapters.safetensors"
#: Settings that an adapter has, and training cannot change.
_FIXED = ("lora_rank", "lora_scale", "lora_layers", "lora_keys")


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """What a folder says of its adapter."""

    path: Path
    #: "full": no adapter but the values of whole weights, which mlx-lm stores in the same way.
    kind: Literal["lora", "dora", "full"]
    #: Settings of section [model] that load the adapter on its base; `model_name` only if it names the base.
    settings: Mapping[str, Any]
    #: PEFT's description; None for a folder of mlx-lm.
    peft: PeftAdapter | None = None

    @property
    def weights(self) -> Path:
        """The file with its arrays."""
        return self.path / (MLX_LM_WEIGHTS if self.peft is None else PEFT_WEIGHTS)


def read_adapter(folder: Path) -> AdapterFolder:
    """Read the description of the adapter in a folder.

    Raises:
        ModelError: The folder holds no adapter, or one of a kind that mlx-lm cannot represent.
    """
    if not (folder / MLX_LM_WEIGHTS).is_file() and not (folder / PEFT_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle: save it again with peft, as safetensors" if pickled else ""
        raise ModelError(
            f"{folder}: no adapter folder (neither {MLX_LM_WEIGHTS} nor PEFT's {PEFT_WEIGHTS} found){hint}"
        )
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(f"{folder}: no adapter folder ({ADAPTER_CONFIG} not found)")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        if (folder / MLX_LM_WEIGHTS).is_file():
            return _of_mlx_lm(folder, described)
        peft = read_peft(folder, described)
        return AdapterFolder(folder, peft.kind, peft.settings, peft)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ModelError(f"{file}: does not describe an adapter: {what}") from error


def check_start(config: ModelConfig) -> AdapterFolder:
    """Return what `config.adapter_path` describes; checks that the settings can start from it.

    Raises:
        ModelError: as `read_adapter`.
        ConfigError: The settings describe another adapter.
    """
    found = read_adapter(Path(config.adapter_path).expanduser())
    if config.fine_tune_type not in ("full", found.kind):
        cure = (
            'set fine_tune_type = "full"'
            if found.kind == "full"
            else f'set fine_tune_type = "{found.kind}" to train it on, or "full" to add it to the weights and train those'
        )
        raise ConfigError(f"model.adapter_path: {found.path} is of the kind {found.kind}; {cure}")
    if config.fine_tune_type != "full":
        wrong = [key for key in _FIXED if getattr(config, key) != found.settings[key]]
        if wrong:
            raise ConfigError(
                f"model.{wrong[0]}: must be {found.settings[wrong[0]]}, as in {found.path}, "
                f"got {getattr(config, wrong[0])}; leave it out"
            )
    return found


def _of_mlx_lm(folder: Path, described: Mapping[str, Any]) -> AdapterFolder:
    kind = described.get("fine_tune_type", "lora")  # as mlx-lm reads it
    if kind not in ("lora", "dora", "full"):
        raise ValueError(f"fine_tune_type must be lora, dora or full, got {kind}")
    base = described.get("model")
    settings: dict[str, Any] = {"model_name": base} if base else {}
    settings["fine_tune_type"] = kind
    if kind != "full":
        parameters = described["lora_parameters"]
        settings |= {
            "base_bits": described.get("base_quantization", {}).get("bits", 0),
            "lora_layers": described["num_layers"]
            if described["num_layers"] > 0
            else -1,  # as mlx-lm reads it
            "lora_rank": parameters["rank"],
            "lora_scale": float(parameters["scale"]),
            "lora_keys": tuple(parameters.get("keys") or ()),
        }
    return AdapterFolder(folder, kind, settings)
