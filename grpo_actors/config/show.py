"""Format the output of ``--dry-run``: the resolved settings in TOML, with the origin and the choices of each value.

Loading the text again gives the same configuration.
"""

import json
from collections.abc import Mapping, Sequence

from grpo_actors.config.load import LoadedConfig
from grpo_actors.config.schema import SECTIONS
from grpo_actors.config.wording import choices_of, toml_value

#: Width of a setting in characters; a longer one pushes its remark to the right.
SETTING_COLUMNS = 44


def as_text(
    loaded: LoadedConfig, *, memory_plan: str | None = None, rewards: Mapping[str, float] | None = None
) -> str:
    """Format the settings in TOML, each with its origin, description and choices.

    Notes, rewards and memory plan follow as comments.

    Args:
        loaded: The settings.
        memory_plan: Its lines.
        rewards: Reward name -> weight of those that will score, the task's own if the settings name none.
    """
    lines: list[str] = []
    for section in SECTIONS:
        lines += [f"[{section}]", *_settings(loaded, section), ""]
    lines += _comment("note", loaded.notes)
    source = "reward.functions" if loaded.config.reward.functions else f"the task {loaded.config.data.task}"
    lines += _comment(
        "reward", [f"{name}, weight {weight:g}, from {source}" for name, weight in (rewards or {}).items()]
    )
    lines += _comment("memory", memory_plan.splitlines() if memory_plan else [])
    return "\n".join(lines).rstrip() + "\n"


def as_json(
    loaded: LoadedConfig, *, memory_plan: str | None = None, rewards: Mapping[str, float] | None = None
) -> str:
    """Format the same for programs: one JSON object with config, origins, choices, notes, rewards and memory_plan."""
    choices = {
        f"{section}.{leaf}": [json.loads(choice) for choice in choices_of(field)]
        for section, settings in SECTIONS.items()
        for leaf, field in settings.model_fields.items()
    }
    text = json.dumps(
        {
            "config": loaded.config.model_dump(mode="json"),
            "origins": dict(loaded.origins),
            "choices": {key: values for key, values in choices.items() if values},
            "notes": list(loaded.notes),
            "rewards": dict(rewards or {}),
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
        choices = choices_of(field)
        among = f" (one of {', '.join(choices)})" if choices else ""
        remark = f"{origins[leaf]:<{width}} | {field.description}{among}"
        lines.append(f"{setting:<{SETTING_COLUMNS}} # {remark}")
    return lines


def _comment(title: str, lines: Sequence[str]) -> list[str]:
    return [f"# {title}: {line}" for line in lines]
