"""The type of a model's floats, as its config.json states it. Loads no MLX: the supervisor uses it too.

Models with several parts state it for each: at the top, in ``text_config``, or in both; as ``dtype`` or ``torch_dtype``.
"""

from collections.abc import Mapping
from typing import Any

_KEYS = ("torch_dtype", "dtype")
#: Parts that describe how weights are packed: a dtype in them is not that of the model's floats.
_PACKING = ("quantization", "quantization_config")


def stored_dtype(architecture: Mapping[str, Any]) -> str | None:
    """Return the name of the type; None if config.json states none."""
    nested = architecture.get("text_config")
    parts = [architecture, nested] if isinstance(nested, dict) else [architecture]
    return next((str(part[key]) for part in parts for key in _KEYS if part.get(key)), None)


def with_dtype(architecture: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a copy that states the type `name` wherever one is stated: transformers casts each part to its own."""
    changed = dict(architecture)
    for key, value in architecture.items():
        if key in _KEYS:
            changed[key] = name
        elif isinstance(value, dict) and key not in _PACKING:
            changed[key] = with_dtype(value, name)
    return changed
