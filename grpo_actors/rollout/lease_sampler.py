"""The leases that a worker is sampling, and the sampler that is open while there are any.

By default the worker drains: it samples one grant at a time, in a batch sized for that grant, and returns the groups
together. With ``rollout.in_flight_updates`` the leases of any number of grants share one sampler: each group is returned
as soon as it is whole, and the next one takes its rows. This module uses no message but `Lease`; the worker decides when
to begin.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from grpo_actors.config import Config
from grpo_actors.policy.decoding.draw import Respond
from grpo_actors.policy.decoding.sampling import Sample, Sampler, SamplingParams, rows_for
from grpo_actors.policy.model import Policy
from grpo_actors.wire.messages import Lease, read_ints


@dataclass(slots=True)
class LeaseSamples:
    """A lease that is being sampled. Its samples grow with each step."""

    lease: Lease
    samples: list[Sample]
    whole: bool = False
    #: Seconds: its share of the steps since it began.
    sampling_s: float = 0.0


@dataclass
class LeaseSampler:
    """Samples leases with one policy.

    While there are no leases, the policy is in the state in which it trains, and neither caches nor copies of weights are
    held.
    """

    policy: Policy
    config: Config
    params: SamplingParams
    #: Returns the function that replies to the turns of a lease's completions; None if they have one turn.
    respond: Callable[[Lease], Respond | None]
    #: By lease number. A lease stays until it is dropped, even after it is whole.
    leases: dict[int, LeaseSamples] = field(default_factory=dict)
    #: Open while at least one lease is not whole.
    _sampler: Sampler | None = None

    def begin(self, leases: Sequence[Lease], version: int) -> None:
        """Sample these leases too; `version` is the number of the weights that the policy holds."""
        prompts = [read_ints(lease.prompt) for lease in leases]
        if self._sampler is None:
            max_rows = self._max_rows(leases, max(map(len, prompts)))
            self._sampler = Sampler(self.policy, self.params, max_rows, version)
        for lease, prompt in zip(leases, prompts, strict=True):
            samples = self._sampler.submit(lease.lease, prompt, lease.seeds, self.respond(lease))
            self.leases[lease.lease] = LeaseSamples(lease, samples)

    def step(self) -> tuple[int, list[LeaseSamples]]:
        """Decode one token of every completion; there must be at least one lease.

        Returns:
            The number of tokens read, and the leases that are ready to be sent, in the order in which they began.
        """
        started_s = time.monotonic()
        tokens, groups = self._sampler.step() if self._sampler is not None else (0, [])
        share_s = (time.monotonic() - started_s) / len(self.leases)
        for sampling in self.leases.values():
            sampling.sampling_s += share_s
        for lease, _ in groups:
            self.leases[lease].whole = True
        self._close_if_done()
        whole = [sampling for sampling in self.leases.values() if sampling.whole]
        together = not self.config.rollout.in_flight_updates
        return tokens, [] if together and len(whole) < len(self.leases) else whole

    def drop(self, leases: Iterable[int]) -> None:
        """Drop these leases, whole or not; unknown numbers are ignored."""
        for lease in self.leases.keys() & set(leases):
            del self.leases[lease]
            if self._sampler is not None:
                self._sampler.drop(lease)
        self._close_if_done()

    def adopt(self, version: int, arrays: Mapping[str, mx.array]) -> None:
        """Load new weights, possibly between two steps of the same completions.

        Raises:
            ModelError: the weights belong to another model.
        """
        if self._sampler is None:
            self.policy.load_trainable(arrays)
        else:
            self._sampler.adopt(version, arrays)

    def _close_if_done(self) -> None:
        if self._sampler is not None and all(sampling.whole for sampling in self.leases.values()):
            self._sampler.close()
            self._sampler = None

    def _max_rows(self, leases: Sequence[Lease], longest: int) -> int:
        """Return how many completions to decode side by side: in this batch, or with in-flight updates in every batch."""
        rollout, completions = self.config.rollout, sum(len(lease.seeds) for lease in leases)
        if rollout.in_flight_updates:
            completions = rollout.batch_groups * rollout.num_generations
            longest = self.config.data.max_prompt_length
        return rows_for(self.policy, completions, longest, self.params)
