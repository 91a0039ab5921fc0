"""The extra that the page needs; importing this loads none of it."""

import importlib.util

from grpo_actors.errors import ConfigError

#: The packages of the extra.
PACKAGES = ("bokeh", "starlette", "uvicorn")


def missing_packages() -> list[str]:
    """Return the packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def check_installed() -> None:
    """Check that the extra is installed. Raises `ConfigError` with the command that installs it."""
    if missing := missing_packages():
        raise ConfigError(f"the page needs {', '.join(missing)}: pip install 'grpo-actors[page]'")
