"""What decoding finds out about a model once, and keeps for as long as its policy lives."""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from grpo_actors.policy.model import Policy


@dataclass
class Findings:
    """Of one policy's model. None: not tried yet."""

    #: Whether its cache can be a `window` (`step.fits`).
    fits_window: bool | None = None
    #: Whether prompts of unlike lengths can share a fixed batch.
    respects_padding: bool | None = None
    #: Through what it calls attention (`attention.callers`); False: no kernel can take the place of all of it here.
    attention_callers: Any = None
    #: Whether `blocks` give what its own layers give.
    fits_blocks: bool | None = None
    #: Its compiled steps (`step`), by parameters and kind.
    compiled_steps: dict[Any, Any] = field(default_factory=dict)


# Nothing in the findings may hold the policy itself: it would never be freed.
_FINDINGS: WeakKeyDictionary[Policy, Findings] = WeakKeyDictionary()


def findings(policy: Policy) -> Findings:
    """Return the findings about a policy's model; the caller adds to them."""
    return _FINDINGS.setdefault(policy, Findings())
