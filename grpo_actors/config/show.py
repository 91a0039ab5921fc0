"""Format the output of ``--dry-run``: the resolved settings in TOML, with the origin of each value.

Loading the text again gives the same configuration.
"""

import json
from collections.abc import Sequence

from grpo_actors.config.load import LoadedConfig
from grpo_actors.config.schema import SECTIONS
from grpo_actors.config.wording import toml_value

#: Width of a setting in characters; a longer one pushes its remark to the right.
SETTING_COLUMNS = 44


def as_text(loaded: LoadedConfig, *, memory_plan: str | None = None) -> str:
    """Format the settings in TOML, each with its origin and description; notes and memory plan follow as comments."""
    lines: list[str] = []
    for section in SECTIONS:
        lines += [f"[{section}]", *_settings(loaded, section), ""]
    lines += _comment("note", loaded.notes)
    lines += _comment("memory", memory_plan.splitlines() if memory_plan else [])
    return "\n".join(lines).rstrip() + "\n"


def as_json(loaded: LoadedConfig, *, memory_plan: str | None = None) -> str:
    """Format the same for programs: one JSON object with config, origins, notes and memory_plan."""
    text = json.dumps(
        {
            "config": loaded.config.model_dump(mode="json"),
            "origins": dict(loaded.origins),
            "notes": list(loaded.notes),
            "memory_plan": memory_plan,
        },
        indent=2,
        ensure_ascii=False,
    )
    return text + "\n"


def _settings(loaded: LoadedConfig, section: str) -> list[str]:
    values = getattr(loaded.config, section)
    origins = {leaf: loaded.origins[f"{section}.{leaf}"] for leaf in SECTIONS[section].model_fields}
    width = max(len(origin) for origin in origins.values())
    lines = []
    for leaf, field in SECTIONS[section].model_fields.items():
        value = getattr(values, leaf)
        # TOML has no null: a setting that is not set is a comment.
        setting = f"# {leaf}: not set" if value is None else f"{leaf} = {toml_value(value)}"
        lines.append(f"{setting:<{SETTING_COLUMNS}} # {origins[leaf]:<{width}} | {field.description}")
    return lines


def _comment(title: str, lines: Sequence[str]) -> list[str]:
    return [f"# {title}: {line}" for line in lines]
