"""What is found where settings that are valid alone contradict each other."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One broken rule. `keys[0]` is the setting that the message is about; the others are involved."""

    keys: tuple[str, ...]
    rule: str
    value: Any
