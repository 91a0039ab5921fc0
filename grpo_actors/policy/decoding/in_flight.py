"""Sampling that outlives the weights: new ones are taken between two decoding steps. PipelineRL, 2509.19128.

A completion may then have tokens of several versions, each computed on keys and values of its own version and of
those before it. Adapters are part of the weights while it samples (`adapter.fused`, `dora.fixed_norms`): they are
taken out and put in anew at each change.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import mlx.core as mx

from grpo_actors.policy.decoding.batching import Sampler
from grpo_actors.policy.decoding.draw import SamplingParams
from grpo_actors.policy.model import Policy
from grpo_actors.policy.sampling import ready


class InFlight:
    """One `sampler`, and the one way to change its policy's weights. Close it, and the policy is as it was."""

    def __init__(self, policy: Policy, params: SamplingParams, places: int, version: int) -> None:
        """`places`: completions that are decoded at a time, at most; `version`: of the weights held now."""
        self._policy = policy
        self._prepared = ExitStack()
        self._prepare()
        self.sampler = Sampler(policy, params, places, version)

    def adopt(self, version: int, arrays: Mapping[str, mx.array]) -> None:
        """Go on with these weights: all steps from the next one on are theirs.

        Raises:
            ModelError: they are another model's.
        """
        self._prepared.close()
        self.sampler.forget_weights()
        self._policy.load_trainable(arrays)
        self._prepare()
        self.sampler.adopt(version)

    def close(self) -> None:
        """Give the policy back as it trains; may be called twice."""
        self._prepared.close()

    def _prepare(self) -> None:
        self._prepared.enter_context(ready(self._policy))
