"""The settings of one run, or those in which several runs differ. Pure."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from grpo_actors.config import Config
from grpo_actors.observe.records import Record
from grpo_actors.observe.view import mapping

#: Settings that say where a run is, not what it does.
_PLACES = frozenset({"run.output_dir", "run.resume", "run.run_name"})


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return dotted name -> value of each run, for the settings whose values are not all equal.

    A setting that a run does not have counts as None. Places and names are left out: they always differ.
    """
    names = dict.fromkeys(name for config in configs for name in config if name not in _PLACES)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: row for name, row in values.items() if any(one != other for one, other in pairwise(row))}


def by_name(start: Record | None) -> dict[str, Any]:
    """Return the settings of a ``start`` record by dotted name; empty without one."""
    return {
        f"{section}.{name}": value
        for section, settings in mapping(start, "config").items()
        if isinstance(settings, dict)
        for name, value in settings.items()
    }


def config_of(start: Record | None) -> Config | None:
    """Return the settings of a ``start`` record, reward functions included; None if they are of another version."""
    try:
        return Config.model_validate_json(json.dumps(mapping(start, "config")))
    except ValidationError:
        return None
