"""Report which code and library versions produced a result. Loads no MLX."""

import importlib.metadata
import subprocess
from pathlib import Path

from grpo_actors import __version__

_CHECKOUT = Path(__file__).parents[2]
#: The libraries that affect what is computed.
_LIBRARIES = ("mlx", "mlx-lm", "transformers")
_GIT_S = 10.0


def versions() -> dict[str, str]:
    """Return the versions of this package and of `_LIBRARIES`, by package name."""
    return {"grpo-actors": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def commit() -> str | None:
    """Return the git commit of the package's checkout, with ``-dirty`` if files differ; None if there is no checkout."""
    # Check for .git here: an installed package may lie inside another project's checkout.
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
