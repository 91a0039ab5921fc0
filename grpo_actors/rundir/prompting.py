"""The prompt that a run trains with, besides the problem: it travels with the trained model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_actors.config import read_config
from grpo_actors.rundir.checkpoints import checkpoint_at
from grpo_actors.rundir.data import read_data
from grpo_actors.rundir.folder import CONFIG_FILE

#: Characters of a system prompt that are shown.
SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Prompting:
    """What stands around a problem."""

    #: The system prompt; empty: none, or the problems have different ones.
    system: str = ""
    #: Variables of the chat template.
    template_settings: Mapping[str, Any] = field(default_factory=dict)


def notice(system: str) -> str:
    """Return a line for the user of a system prompt that nobody has typed."""
    quoted = json.dumps(system, ensure_ascii=False)
    shown = quoted if len(quoted) <= SHOWN_CHARACTERS else f"{quoted[:SHOWN_CHARACTERS]} …"
    return f"note: with the system prompt {shown}; --no-system leaves it out"


def prompting_of_run(run_dir: Path) -> Prompting:
    """Return the prompt of a run.

    Raises:
        ConfigError: its settings are unusable.
        RunError: its data.json is unusable.
    """
    settings, data = read_config(run_dir / CONFIG_FILE).data, read_data(run_dir)
    return Prompting(
        (settings.system_prompt or "") if data is None else data.system_prompt, settings.chat_template_kwargs
    )


def prompting_of(folder: str) -> Prompting:
    """Return the prompt of the run of a checkpoint; an empty one for any other folder, and for a hub id.

    Raises:
        GrpoActorsError: As `prompting_of_run`.
    """
    path = Path(folder).expanduser()
    if checkpoint_at(path) is None or not (path.parent / CONFIG_FILE).is_file():
        return Prompting()
    return prompting_of_run(path.parent)
