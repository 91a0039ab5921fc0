"""Facts about a model that decoding determines once and keeps for as long as the policy exists."""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from grpo_actors.policy.model import Policy


@dataclass
class Findings:
    """Facts about one policy's model; None if not determined yet."""

    #: Whether a `window` can hold its cache (`step.fits`).
    fits_window: bool | None = None
    #: Whether prompts of different lengths can share a batch that is not a window.
    respects_padding: bool | None = None
    #: The callers of attention (`attention.callers`); False if no kernel can replace all of its attention on this machine.
    attention_callers: Any = None
    #: Whether `blocks` give the same logits as its own layers.
    fits_blocks: bool | None = None
    #: Whether a step of the blocks can be recorded and gives the same logits (`recorded_step`).
    records: bool | None = None
    #: Compiled steps (`step`), by parameters and kind.
    compiled_steps: dict[Any, Any] = field(default_factory=dict)


# Nothing in the findings may refer to the policy itself; it would never be freed.
_FINDINGS: WeakKeyDictionary[Policy, Findings] = WeakKeyDictionary()


def findings(policy: Policy) -> Findings:
    """Return the facts about a policy's model; the caller adds to them."""
    return _FINDINGS.setdefault(policy, Findings())
