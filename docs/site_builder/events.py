"""The reference of the records, from the schema by which they are written."""

from grpo_actors.observe.records import FIELDS


def markdown() -> str:
    """Return one table of fields per topic."""
    parts = []
    for topic, fields in FIELDS.items():
        rows = "\n".join(
            f"| `{name}` | {meaning.replace('|', '&#124;')} |" for name, meaning in fields.items()
        )
        parts.append(f"## {topic}\n\n| field | meaning |\n|---|---|\n{rows}\n")
    return "\n".join(parts)
