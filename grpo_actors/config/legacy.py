"""Translate names of MLX-GRPO's flat files that this program has replaced.

Flat keys need no table: the name of a leaf is unique, so `names.leaf_of` finds its section.
"""

from collections.abc import Mapping
from typing import Any

from grpo_actors.config.wording import brief
from grpo_actors.errors import ConfigError

#: A file may have its flat keys in this table.
FLAT_TABLE = "mlx_grpo"

#: Older name -> the leaf that replaced it.
OLDER_NAMES = {
    "max_completion_length": "max_new_tokens",
    "eval_samples": "eval_subset_size",
    "eval_steps": "eval_every_updates",
}


def modernise(
    values: Mapping[str, Any], *, where: str, gradient_accumulation_steps: int
) -> tuple[dict[str, Any], list[str]]:
    """Replace older names by the present ones; if both are given, the present one wins.

    Args:
        values: Leaf name -> value, of one source.
        where: Name of the source, for notes and errors.
        gradient_accumulation_steps: Micro-steps in one update, resolved over all sources.

    Returns:
        The values under present names, and a note on each decision.
    """
    result = dict(values)
    notes = []
    for older, newer in OLDER_NAMES.items():
        if older not in result:
            continue
        given = result.pop(older)
        if newer in result:
            notes.append(
                f"{where}: {older} = {brief(given)} is ignored: {newer} = {brief(result[newer])} wins"
            )
            continue
        if older == "eval_steps":
            result[newer] = _updates_between_evaluations(given, gradient_accumulation_steps, where)
            how = f"micro-steps, {gradient_accumulation_steps} in an update"
        else:
            result[newer] = given
            how = "an older name"
        notes.append(f"{where}: {older} = {brief(given)} ({how}) is read as {newer} = {brief(result[newer])}")
    return result, notes


def _updates_between_evaluations(eval_steps: Any, gradient_accumulation_steps: int, where: str) -> int:
    """Convert `eval_steps`, which MLX-GRPO counts in micro-steps; 0 stays 0, which is off."""
    if type(eval_steps) is not int or eval_steps < 0:
        raise ConfigError(f"{where}: eval_steps must be a whole number ≥ 0, got {brief(eval_steps)}")
    return max(1, eval_steps // gradient_accumulation_steps) if eval_steps else 0
