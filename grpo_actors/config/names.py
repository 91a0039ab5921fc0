"""Find the setting that a user's name refers to: in a section, bare, or as a flat key of MLX-GRPO.

Handles names only; values pass through unchanged.
"""

from collections.abc import Mapping
from typing import Any

from grpo_actors.config.legacy import FLAT_TABLE, OLDER_NAMES
from grpo_actors.config.schema import OWNER, SECTIONS
from grpo_actors.config.wording import brief
from grpo_actors.errors import ConfigError, nearest


def leaf_of(name: str, where: str) -> str:
    """Return the leaf of ``rollout.num_generations``, ``num_generations`` or ``mlx_grpo.num_generations``; older names stay.

    Raises:
        ConfigError: No setting has this name; the message suggests the nearest one.
    """
    section, dot, leaf = name.rpartition(".")
    if name in SECTIONS:
        raise ConfigError(f"{where}: {name} is a section; name one of its settings, as {name}.KEY")
    if not dot or section == FLAT_TABLE:
        if leaf in OWNER or leaf in OLDER_NAMES:
            return leaf
        raise ConfigError(f"{where}: {name} is not a setting{nearest(leaf, [*OWNER, *OLDER_NAMES])}")
    if OWNER.get(OLDER_NAMES.get(leaf, leaf)) == section:
        return leaf
    if (present := OLDER_NAMES.get(leaf, leaf)) in OWNER:
        raise ConfigError(f"{where}: {name} is not a setting; did you mean {OWNER[present]}.{present}?")
    if section not in SECTIONS:
        raise ConfigError(f"{where}: [{section}] is not a section{nearest(section, SECTIONS)}")
    raise ConfigError(f"{where}: {name} is not a setting{nearest(leaf, SECTIONS[section].model_fields)}")


def leaves(document: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Flatten a TOML document.

    Returns:
        Leaf name -> value, with older names kept; and the leaves that were given outside the sections.

    Raises:
        ConfigError: A name is unknown, or a setting is given twice.
    """
    spelled: dict[str, str] = {}
    values: dict[str, Any] = {}
    flat: list[str] = []
    for name, value in _entries(document, where):
        leaf = leaf_of(name, where)
        if leaf in spelled:
            raise ConfigError(
                f"{where}: {spelled[leaf]} and {name} are one setting, given twice; keep one of them"
            )
        spelled[leaf] = name
        values[leaf] = value
        if name.rpartition(".")[0] in ("", FLAT_TABLE):
            flat.append(leaf)
    return values, flat


def _entries(document: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for name, value in document.items():
        is_section = name in SECTIONS or name == FLAT_TABLE
        if is_section and not isinstance(value, dict):
            raise ConfigError(f"{where}: {name} must be a table ([{name}]), got {brief(value)}")
        if not is_section and isinstance(value, dict) and name not in OWNER:
            raise ConfigError(f"{where}: [{name}] is not a section{nearest(name, SECTIONS)}")
        entries += (
            [(f"{name}.{leaf}", item) for leaf, item in value.items()] if is_section else [(name, value)]
        )
    return entries
