"""Describe a value, the rule of a setting and a broken rule in words, with values in TOML's notation.

The rule is derived from the schema, so that an error message always agrees with the bounds that were checked.
"""

import json
import math
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from grpo_actors.config.schema import SECTIONS
from grpo_actors.config.section import Section
from grpo_actors.errors import nearest

#: Characters of a value in an error message, which has one line; a longer value is cut.
SHOWN_CHARACTERS = 80

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text in quotes",
    tuple: "a list of texts, none empty",
    dict: "a table of name = finite weight",
    dict[str, Any]: "a table of settings",
}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def toml_value(value: Any) -> str:
    """Return a value in TOML's notation, with inline tables. TOML has no `None`: the caller must leave it out."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf and nan, as in TOML
    if isinstance(value, str):
        # JSON and TOML have the same escapes, but JSON does not escape the control character DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Section):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        pairs = (f"{toml_value(str(name))} = {toml_value(item)}" for name, item in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    return str(value)  # numbers and dates


def brief(value: Any) -> str:
    """Return `toml_value`, cut to the length of an error message."""
    text = toml_value(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def kind_of(field: FieldInfo) -> Any:
    """Return the type of a setting without ``| None``; the first one if there are several."""
    return _kinds_of(field)[0]


def rule_of(field: FieldInfo) -> str:
    """Describe what a setting must be, such as ``a whole number ≥ 1``, with the reason if the schema gives one."""
    rule = " or ".join(_rule(kind, field.metadata) for kind in _kinds_of(field))
    extra = field.json_schema_extra
    return f"{rule} ({extra['why']})" if isinstance(extra, dict) and "why" in extra else rule


def choices_of(field: FieldInfo) -> list[str]:
    """Return the values in TOML that a setting, or an item of its list, can have; empty if there is no list of them."""
    kind = kind_of(field)
    item = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return [toml_value(choice) for choice in get_args(item)] if get_origin(item) is Literal else []


def _kinds_of(field: FieldInfo) -> list[Any]:
    """Return the types of a setting without ``None``; nearly all settings have one."""
    kind = field.annotation
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [choice for choice in choices if choice is not type(None)]


def _rule(kind: Any, metadata: Iterable[Any]) -> str:
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        return _rule(kind, [bound for each in more for bound in getattr(each, "metadata", [each])])
    if get_origin(kind) is Literal:
        choices = [toml_value(choice) for choice in get_args(kind)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        return f"a list of {', '.join(toml_value(choice) for choice in get_args(get_args(kind)[0]))}"
    if (
        get_origin(kind) is tuple
        and isinstance(table := get_args(kind)[0], type)
        and issubclass(table, Section)
    ):
        return f"a list of tables with the settings {', '.join(table.model_fields)}"
    rule = _KINDS.get(kind) or _KINDS[get_origin(kind) or kind]
    bounds = list(metadata)
    if any(isinstance(bound, annotated_types.MinLen) for bound in bounds):
        rule += ", not empty"
    signs = [
        f"{sign} {getattr(bound, name)}"
        for bound in bounds
        for name, sign in _SIGNS.items()
        if hasattr(bound, name)
    ]
    return f"{rule} {' and '.join(signs)}" if signs else rule


def broken_rule(error: ValidationError, where: Callable[[tuple[str, ...]], str]) -> str:
    """Describe the first of pydantic's errors in one line.

    Args:
        error: The error from validating `Config`.
        where: Maps dotted keys to the source that set them.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "contradiction":
        context = first["ctx"]
        return f"{where(context['keys'])}: {context['key']} {context['rule']}, got {brief(context['value'])}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    location = [str(part) for part in first["loc"]]
    if not location:
        return f"{where(())}: must be a table of sections, got {brief(first['input'])}"
    key, value = ".".join(location[:2]), brief(first["input"])
    if first["type"] == "extra_forbidden":
        inside = f"[{location[2]}]: {location[3]}" if len(location) > 3 else ""
        return f"{where((key,))}: {key}{inside} is not a setting{more}"
    if len(location) == 1:
        return f"{where((key,))}: {key} must be a table, got {value}{more}"
    # A deeper location is an item of a list or of a table.
    item = f"[{brief(first['loc'][2])}]" if len(location) > 2 else ""
    field = SECTIONS[location[0]].model_fields[location[1]]
    if len(location) > 3:  # a setting of a table in a list of tables
        inner = get_args(kind_of(field))[0].model_fields[location[3]]
        what = "must be given" if first["type"] == "missing" else f"must be {rule_of(inner)}, got {value}"
        return f"{where((key,))}: {key}{item}: {location[3]} {what}{more}"
    at = f" at {item}" if item else ""
    return f"{where((key,))}: {key} must be {rule_of(field)}, got {value}{at}{_nearest_choice(field, value)}{more}"


def _nearest_choice(field: FieldInfo, value: str) -> str:
    return nearest(value, choices_of(field))
