"""The reference of all settings, from the models that check them."""

from pydantic.fields import FieldInfo

from grpo_actors.config.resume import MATTERS_FOR_RESUME
from grpo_actors.config.schema import SECTIONS
from grpo_actors.config.wording import rule_of, toml_value


def markdown() -> str:
    """Return one section per table of the configuration, with an entry for each setting."""
    parts = []
    for name, section in SECTIONS.items():
        purpose = (section.__doc__ or "").partition(": ")[2]
        parts.append(f"## [{name}]\n\n{purpose[0].upper()}{purpose[1:]}\n")
        parts += [_entry(name, leaf, field) for leaf, field in section.model_fields.items()]
    return "\n".join(parts)


def _entry(section: str, leaf: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "not set" if default is None else toml_value(default)
    meaning = field.description or ""
    fixed = " Fixed once a run has begun." if f"{section}.{leaf}" in MATTERS_FOR_RESUME else ""
    return (
        f"```{{setting}} {section}.{leaf} = {shown}\n{meaning[0].upper()}{meaning[1:]}.\n\n"
        f"Must be {rule_of(field)}.{fixed}\n```\n"
    )
