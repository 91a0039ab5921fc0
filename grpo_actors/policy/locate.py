"""Locate a model: the embedded one, a folder, or a hub id. Loads no MLX: the supervisor uses it too."""

from pathlib import Path

from grpo_actors.errors import ModelError

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny"


def locate(model_name: str, setting: str = "model.model_name") -> Path | str:
    """Return the folder of a model, or its hub id where no such folder exists.

    Args:
        model_name: The name as the user gave it.
        setting: The setting or option that holds the name, for error messages.

    Raises:
        ModelError: the name is a path, but there is no usable model.
    """
    if model_name == "tiny":
        return EMBEDDED
    path = Path(model_name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{setting}: {path} is no model folder (config.json not found)")
        if not list(path.glob("model*.safetensors")):
            if list(path.glob("*.bin")):
                raise ModelError(
                    f"{setting}: {path} holds its weights in PyTorch's .bin files, and mlx-lm reads safetensors alone; "
                    "load it with transformers and write it again with save_pretrained, or name a safetensors copy"
                )
            raise ModelError(
                f"{setting}: {path} holds no weights (model*.safetensors not found); "
                "mlx-lm reads safetensors alone; grpo convert --gguf makes them of a GGUF file"
            )
        return path
    if model_name.startswith((".", "/", "~")) or model_name.count("/") != 1:
        raise ModelError(f"{setting}: no folder {path}, and {model_name!r} is no hub id (owner/name)")
    # Also the hub's ids look like paths, and the hub is asked for half a minute.
    if path.parent.is_dir() and not _is_downloaded(model_name):
        raise ModelError(
            f"{setting}: no folder {path.name} in {path.parent}/; if the hub's {model_name} is meant, "
            f"download it first: hf download {model_name}"
        )
    return model_name


def _is_downloaded(hub_id: str) -> bool:
    from huggingface_hub import constants  # noqa: PLC0415 - rarely asked

    return (Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}").is_dir()
