"""Convert a Hugging Face folder or hub id: cast and quantise the weights, and write them with the tokenizer.

mlx-lm does the work; cases that it cannot handle are refused here before anything is written. Covers the language
models that mlx-lm supports; `vision` converts models that also take images.
"""

import contextlib
import difflib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from huggingface_hub.errors import StrictDataclassError
from mlx import nn
from mlx.utils import tree_flatten

from grpo_actors.atomic import write_contents, write_fault
from grpo_actors.convert.writing import check_finite, check_space, update_json
from grpo_actors.errors import ModelError, first_line
from grpo_actors.policy import tokenizer
from grpo_actors.policy.casting import cast
from grpo_actors.policy.config_dtype import with_dtype
from grpo_actors.policy.foreign import load_fault, refuse_foreign
from grpo_actors.policy.locate import locate
from grpo_actors.policy.model import DTYPES
from grpo_actors.policy.plan import GROUP_SIZES, Plan
from grpo_actors.policy.quantization import is_quantized, storage
from grpo_actors.policy.tokenizer_files import CONFIG, OLDER_SPECIAL_TOKENS, read_files

#: Errors that mlx-lm and transformers raise for a folder that they cannot read.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, StrictDataclassError)


def find(name: str) -> Path:
    """Return the folder `name`, or the local copy of the hub model with this id.

    Raises:
        ModelError: the folder is missing or holds no model, or the hub cannot be reached.
    """
    location = locate(name, setting="--hf-path")
    if isinstance(location, Path):
        return location
    try:
        return Path(mlx_lm.utils._download(location))  # noqa: SLF001 - the files that mlx-lm reads, and no others
    except UNREADABLE as error:
        raise ModelError(
            f"--hf-path: {name} is no folder, and the hub did not give it ({first_line(error)}); "
            "check the name and the network, or give the path of a folder"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a model folder.

    Raises:
        ModelError: it cannot be read, or names no model type.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: config.json cannot be read: {first_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: config.json names no model_type; the folder is no model that mlx-lm reads")
    return config


def is_known(config: dict[str, Any]) -> bool:
    """Return whether mlx-lm has a module for this architecture."""
    try:
        mlx_lm.utils._get_classes(config)  # noqa: SLF001 - no public way to ask
    except (ValueError, SystemExit):  # olmo's module ends the process if its own package is absent
        return False
    return True


def known_types(near: str) -> list[str]:
    """Return every model type that mlx-lm supports except `near`, the most similar names first."""
    models = Path(mlx_lm.utils.__file__).parent / "models"
    # The folder also holds parts of models; only a model's module defines ModelArgs.
    names = {path.stem for path in models.glob("*.py") if "\nclass ModelArgs" in path.read_text("utf-8")}
    names |= mlx_lm.utils.MODEL_REMAPPING.keys()
    return alike_first(names - {near}, near)


def alike_first(names: Iterable[str], near: str) -> list[str]:
    """Sort the names by similarity to `near`, the most similar first."""
    return sorted(names, key=lambda name: (-difflib.SequenceMatcher(None, near, name).ratio(), name))


def refuse_own_code(path: Path, config: dict[str, Any], plan: Plan) -> None:
    """Refuse a model that brings its own Python code, unless the user trusts it."""
    if config.get("model_file") is not None and not plan.trust_remote_code:
        raise ModelError(
            f"{path}: the model runs Python code of its own ({config['model_file']}); read it, then add --trust-remote-code"
        )


def refuse_unknown(path: Path, config: dict[str, Any]) -> None:
    """Refuse a model for which neither mlx-lm nor the model itself has a module."""
    if config.get("model_file") is None and not is_known(config):
        kind = config["model_type"]
        raise ModelError(
            f"{path}: mlx-lm does not know model_type {kind!r}; it knows {', '.join(known_types(kind))}"
        )


def load_lazily(path: Path, plan: Plan) -> tuple[nn.Module, dict[str, Any]]:
    """Load model and config; no weight is read yet.

    Raises:
        ModelError: mlx-lm refuses the folder.
    """
    refuse_foreign(str(path), read_config(path))
    try:
        model, config = mlx_lm.utils.load_model(path, lazy=True, trust_remote_code=plan.trust_remote_code)
    except UNREADABLE as error:
        raise ModelError(f"{path}: mlx-lm does not load it: {load_fault(error)}") from error
    return model, config


def load_tokenizer(path: Path, plan: Plan) -> Any:
    """Load the tokenizer, as mlx-lm's wrapper of transformers' class.

    Raises:
        ModelError: transformers refuses it.
    """
    try:
        return tokenizer.load_tokenizer(path, trust_remote_code=plan.trust_remote_code)
    except UNREADABLE as error:
        raise ModelError(f"{path}: its tokenizer does not load: {first_line(error)}") from error


def write_folder(source: Path, folder: Path, plan: Plan) -> str:
    """Write the model in `source` into the existing `folder`; returns how its weights are stored.

    Raises:
        ModelError: mlx-lm does not support or load it, the group size does not divide its rows, or the disk is
            too small.
    """
    refuse_own_code(source, read_config(source), plan)
    refuse_unknown(source, read_config(source))
    model, config = load_lazily(source, plan)
    load_tokenizer(source, plan)
    if plan.dtype is not None:
        _cast(source, model, plan.dtype)
        config = with_dtype(config, plan.dtype)
    if plan.bits is not None:
        refuse_group_size(source, model, plan)
        config = _quantize(model, config, plan.bits, plan.group_size)
    stored = storage(model)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    check_space(folder, weights)
    _save(model, folder)
    mlx_lm.utils.save_config(config, folder / "config.json")
    write_contents(folder, read_files(source))
    for file in [
        *source.glob("generation_config.json"),
        *(source.glob("*.py") if plan.trust_remote_code else ()),
    ]:
        shutil.copy(file, folder)
    return stored


def refuse_group_size(
    source: Path, model: nn.Module, plan: Plan, *, skips: Callable[[str], bool] = lambda _name: False
) -> None:
    """Refuse quantised weights, and a group size that does not divide a row that a smaller one would divide.

    Modules whose rows no group size divides stay unquantised, and so do modules whose names `skips` accepts.
    """
    if is_quantized(model):
        raise ModelError(f"{source}: its weights are quantised already; leave out --quantize")
    rows = {
        name: module.weight.shape[-1]
        for name, module in model.named_modules()
        if hasattr(module, "to_quantized")
        and not skips(name)
        and module.weight.shape[-1] % min(GROUP_SIZES) == 0
    }
    misfits = [name for name, row in rows.items() if row % plan.group_size]
    if misfits:
        fitting = max(size for size in GROUP_SIZES if all(row % size == 0 for row in rows.values()))
        raise ModelError(
            f"{source}: --group-size {plan.group_size} does not divide the rows of {misfits[0]}, which have "
            f"{rows[misfits[0]]} weights; take --group-size {fitting}"
        )


def set_end(folder: Path, text: str, plan: Plan) -> None:
    """Make the token `text` the only one that ends answers of the model in `folder`.

    Raises:
        ModelError: `text` is not one token of the vocabulary.
    """
    loaded = load_tokenizer(folder, plan)
    vocabulary = loaded.get_vocab()
    if text not in vocabulary:
        near = ", ".join(alike_first(loaded.get_added_vocab(), text)[:5])
        raise ModelError(
            f"--eos-token: must be one token of the model's vocabulary, got {text!r}; its special tokens are {near}"
        )
    for name in ("config.json", "generation_config.json"):
        update_json(folder / name, {"eos_token_id": vocabulary[text]})
    for name in (CONFIG, OLDER_SPECIAL_TOKENS):
        if name == CONFIG or (folder / name).is_file():
            update_json(folder / name, {"eos_token": text})


def _cast(source: Path, model: nn.Module, dtype: str) -> None:
    """Cast in place. The cast is lazy except to float16, where each weight is checked for overflow."""

    def check(name: str, array: mx.array) -> None:
        check_finite(f"{source}: tensor {name}", array, dtype)

    cast(model, DTYPES[dtype], check if dtype == "float16" else None)


def _quantize(model: nn.Module, config: dict[str, Any], bits: int, group_size: int) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits, which the summary shows
        quantized: dict[str, Any] = mlx_lm.utils.quantize_model(model, config, group_size, bits)[1]
    return quantized


def _save(model: nn.Module, folder: Path) -> None:
    try:
        mlx_lm.utils.save_model(folder, model, donate_model=True)
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: cannot be written: {write_fault(error, folder)}") from None
