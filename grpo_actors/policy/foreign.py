"""Refuse weights in a form that mlx-lm does not read, or reads wrongly, by the name of what is wrong with them."""

from collections.abc import Mapping
from typing import Any

from grpo_actors.errors import ModelError, first_line

#: Methods of ``quantization_config`` that mlx-lm turns into its own form, or unpacks.
_READ = ("awq", "bitnet", "compressed-tensors", "fp8", "modelopt", "mxfp4", "mxfp8")
#: Layout of AWQ that mlx-lm reads; it takes another for this one.
_AWQ_LAYOUT = "gemm"
#: Most characters of a list of tensors in an error.
_LISTED = 200


def refuse_foreign(name: str, architecture: Mapping[str, Any]) -> None:
    """Refuse a model whose config.json names a form of quantisation that mlx-lm does not read right.

    Args:
        name: The setting or option that named the model, and its value.
        architecture: Content of its config.json.

    Raises:
        ModelError: It does.
    """
    described = architecture.get("quantization_config")
    if "quantization" in architecture or not isinstance(described, Mapping):
        return  # MLX's own form, or none
    method = described.get("quant_method")
    layout = str(described.get("version", _AWQ_LAYOUT)).lower()
    if method == "awq" and layout != _AWQ_LAYOUT:
        method = f"awq ({layout})"
    elif method is None or method in _READ:
        return
    raise ModelError(
        f"{name}: its weights were quantised by {method}, which mlx-lm does not read right; "
        "name the unquantised model (model.base_bits = 4 quantises it here)"
    )


def load_fault(error: BaseException) -> str:
    """Return an error of loading a model as one line; a list of tensors that do not fit is part of it."""
    text = str(error)
    if not text.startswith(("Missing ", "Received ")):
        return first_line(error)
    head, _, listed = " ".join(text.split()).partition(": ")
    listed = listed.rstrip(".")
    return f"{head}: {listed if len(listed) <= _LISTED else f'{listed[:_LISTED]}…'}"
