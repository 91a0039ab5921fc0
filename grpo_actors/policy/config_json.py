"""The content of a model's config.json. Loads no MLX: the supervisor reads it too."""

from collections.abc import Mapping
from typing import Any


def text_part(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model.

    A model with several parts, such as text and images, nests them in `text_config`; what that leaves out is at the top.
    """
    nested = architecture.get("text_config")
    return {**architecture, **(nested if isinstance(nested, Mapping) else {})}
