"""Which code and which libraries made something. Loads no MLX."""

import importlib.metadata
import subprocess
from pathlib import Path

from grpo_actors import __version__

_CHECKOUT = Path(__file__).parent.parent
#: The libraries that decide what is computed.
_LIBRARIES = ("mlx", "mlx-lm", "transformers")
_GIT_S = 10.0


def versions() -> dict[str, str]:
    """Package -> version."""
    return {"grpo-actors": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, with ``-dirty`` if files differ; None: installed."""
    # Asked for by name: an installed package may lie within some other project's checkout.
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
