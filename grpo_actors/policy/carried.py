"""A chat template that brings along the prompt of the training: the system prompt and the template's settings.

Programs that load an exported model know nothing of the run. So the exported template adds the system prompt to a chat that
has none, and sets the variables that nobody else sets. ``no_system = true`` leaves the system prompt out.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

#: Variable of such a template that turns its system prompt off.
NO_SYSTEM = "no_system"
#: Variable with the system prompt; its line is found again by `carried_system`.
_SYSTEM = "trained_system_prompt"
_LINE = re.compile(rf"\{{%- set {_SYSTEM} = (\".*\") -%\}}")


def carrying(template: str, system: str, settings: Mapping[str, Any]) -> str:
    """Return a chat template with the prompt of a training; unchanged if there is nothing to bring along.

    Args:
        template: A template in Jinja.
        system: The system prompt; empty: none.
        settings: Variables of the template.
    """
    lines = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif -%}}"
        for name, value in settings.items()
    ]
    if system:
        lines += [
            f"{{%- set {_SYSTEM} = {_literal(system)} -%}}",
            f"{{%- if not {NO_SYSTEM} and messages and messages[0]['role'] not in ['system', 'developer'] -%}}",
            f"{{%- set messages = [{{'role': 'system', 'content': {_SYSTEM}}}] + messages -%}}",
            "{%- endif -%}",
        ]
    return "\n".join(lines).removesuffix("-%}") + "%}" + template if lines else template


def carried_system(template: str) -> str:
    """Return the system prompt that a template of `carrying` brings along; empty: none."""
    found = _LINE.search(template)
    return "" if found is None else str(json.loads(found[1]))


def template_text(tokenizer: Any) -> str:
    """Return the text of the default chat template of mlx-lm's wrapper of a tokenizer; empty if it has none in Jinja."""
    if tokenizer._chat_template is not None:  # noqa: SLF001 - mlx-lm's own function for some architectures
        return ""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or ""


def _literal(value: Any) -> str:
    """Return a value as Jinja writes it: that of JSON, but for null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
