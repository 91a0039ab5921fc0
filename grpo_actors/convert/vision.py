"""Convert models that take images, with mlx-vlm and all their parts.

Training uses only the language part of such a folder: mlx-lm loads it and ignores the rest, for the model families
that it supports.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx import nn
from mlx.utils import tree_flatten

from grpo_actors.atomic import write_contents
from grpo_actors.convert.huggingface import (
    UNREADABLE,
    alike_first,
    is_known,
    load_lazily,
    read_config,
    refuse_group_size,
    refuse_own_code,
)
from grpo_actors.convert.writing import check_space, update_json
from grpo_actors.errors import ModelError, first_line
from grpo_actors.policy.model import DTYPES
from grpo_actors.policy.plan import Plan
from grpo_actors.policy.quantization import storage
from grpo_actors.policy.tokenizer_files import read_files


def takes_images(config: dict[str, Any]) -> bool:
    """Return whether config.json describes a model that takes images."""
    return "vision_config" in config


def no_language_part(folder: Path, plan: Plan) -> str | None:
    """Return why mlx-lm cannot load the language part of `folder` for training or sampling; None if it can."""
    config = read_config(folder)
    if not takes_images(config):
        return None
    if not is_known(config):
        return f"mlx-lm has no language part for model_type {config['model_type']!r}"
    try:
        load_lazily(folder, plan)
    except ModelError as error:
        return str(error)
    return None


def write_folder(source: Path, config: dict[str, Any], folder: Path, plan: Plan) -> str:
    """Write the model in `source` into the existing `folder`; returns how its language part is stored.

    Raises:
        ModelError: mlx-vlm is not installed, or does not support or load the model; the group size does not divide
            its rows; or the disk is too small.
    """
    convert, utils = _mlx_vlm()
    refuse_own_code(source, config, plan)
    model = _load_lazily(source, config, plan)
    if plan.bits is not None:
        refuse_group_size(source, model, plan, skips=utils.skip_multimodal_module)
    # The size before quantisation: an upper bound.
    width = DTYPES[plan.dtype].size if plan.dtype else None
    arrays = [array for _, array in tree_flatten(model.parameters())]
    check_space(folder, sum(array.size * (width or array.itemsize) for array in arrays))
    with _quiet(), _one_line(source, "mlx-vlm does not convert it"):
        convert(
            str(source),
            str(folder),
            quantize=plan.bits is not None,
            q_group_size=plan.group_size,
            q_bits=plan.bits or 4,
            dtype=plan.dtype,
            trust_remote_code=plan.trust_remote_code,
        )
    # mlx-vlm writes the tokenizer in the form of transformers' own version.
    write_contents(folder, read_files(source))
    # mlx-vlm leaves out torch_dtype, which loading the folder for training needs.
    parts = (config, config.get("text_config") or {})
    stored = [part[key] for part in parts for key in ("torch_dtype", "dtype") if part.get(key)]
    if plan.dtype or stored:
        update_json(folder / "config.json", {"torch_dtype": plan.dtype or stored[0]})
    return storage(_load_lazily(folder, config, plan))


def _mlx_vlm() -> tuple[Callable[..., None], Any]:
    """Import mlx-vlm; returns its converter and its module of loaders."""
    try:
        from mlx_vlm import utils  # noqa: PLC0415  an optional extra, and a large one
        from mlx_vlm.convert import convert  # noqa: PLC0415
    except ImportError as error:
        raise ModelError(
            f"--hf-path: this model takes images, which needs mlx-vlm ({first_line(error)}): "
            "pip install 'grpo-actors[vision]', or keep its language part alone with --text-only"
        ) from None
    return convert, utils


def _load_lazily(folder: Path, config: dict[str, Any], plan: Plan) -> nn.Module:
    """Load the whole model; no weight is read yet."""
    _, utils = _mlx_vlm()
    kind = config["model_type"]
    models = Path(utils.__file__).parent / "models"
    known = {path.name for path in models.iterdir() if (path / "__init__.py").is_file()}
    if utils.get_model_type(config) not in known:
        raise ModelError(
            f"{folder}: mlx-vlm does not know model_type {kind!r}; it knows {', '.join(alike_first(known, kind))}"
        )
    with _quiet(), _one_line(folder, "mlx-vlm does not load it"):
        model: nn.Module = utils.load_model(folder, lazy=True, trust_remote_code=plan.trust_remote_code)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress mlx-vlm's progress output, which is not part of the summary."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _one_line(folder: Path, failure: str) -> Iterator[None]:
    """Turn errors of mlx-vlm into a ModelError of one line."""
    try:
        yield
    except (*UNREADABLE, ImportError) as error:
        # ImportError: transformers raises it if a processor needs a package that is absent.
        raise ModelError(f"{folder}: {failure}: {first_line(error)}") from error
