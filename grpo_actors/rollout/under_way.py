"""The leases that a worker is sampling, and the sampler that is open while there are any.

A worker that drains samples one grant at a time, in a batch of its own size, and has its groups back together. With
``rollout.in_flight_updates`` the leases of any number of grants share one sampler: each group is back as soon as it is
whole, and its place is taken by the next. Knows no messages but leases; refuses to know when to begin.
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
class Sampling:
    """One lease. Its samples grow with each step."""

    lease: Lease
    samples: list[Sample]
    whole: bool = False
    #: Its share of the steps since it began.
    sampling_s: float = 0.0


@dataclass
class UnderWay:
    """While nothing has to be sampled the policy is as it trains, and neither caches nor copies of weights are held."""

    policy: Policy
    config: Config
    params: SamplingParams
    #: Returns what answers the turns of a lease's completions; None: they have one turn.
    respond: Callable[[Lease], Respond | None]
    #: By number. A lease stays until it is dropped, also once it is whole.
    leases: dict[int, Sampling] = field(default_factory=dict)
    #: Open while one of them is not whole.
    _sampler: Sampler | None = None

    def begin(self, leases: Sequence[Lease], version: int) -> None:
        """Sample these too; `version` is the number of the weights that the policy holds."""
        prompts = [read_ints(lease.prompt) for lease in leases]
        if self._sampler is None:
            places = self._places(leases, max(map(len, prompts)))
            self._sampler = Sampler(self.policy, self.params, places, version)
        for lease, prompt in zip(leases, prompts, strict=True):
            samples = self._sampler.submit(lease.lease, prompt, lease.seeds, self.respond(lease))
            self.leases[lease.lease] = Sampling(lease, samples)

    def step(self) -> tuple[int, list[Sampling]]:
        """Decode one token of every completion; there must be leases.

        Returns:
            How many tokens were read, and the leases that are ready to be sent, in the order in which they began.
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
        """Go on without these, whole or not; numbers of others are ignored."""
        for lease in self.leases.keys() & set(leases):
            del self.leases[lease]
            if self._sampler is not None:
                self._sampler.drop(lease)
        self._close_if_done()

    def adopt(self, version: int, arrays: Mapping[str, mx.array]) -> None:
        """Put new weights in place, also between two steps of the same completions.

        Raises:
            ModelError: they are another model's.
        """
        if self._sampler is None:
            self.policy.load_trainable(arrays)
        else:
            self._sampler.adopt(version, arrays)

    def _close_if_done(self) -> None:
        if self._sampler is not None and all(sampling.whole for sampling in self.leases.values()):
            self._sampler.close()
            self._sampler = None

    def _places(self, leases: Sequence[Lease], longest: int) -> int:
        """How many completions are decoded side by side: of this batch, or of all batches to come."""
        rollout, completions = self.config.rollout, sum(len(lease.seeds) for lease in leases)
        if rollout.in_flight_updates:
            completions = rollout.batch_groups * rollout.num_generations
            longest = self.config.data.max_prompt_length
        return rows_for(self.policy, completions, longest, self.params)
