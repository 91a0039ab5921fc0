"""The rollout worker that never drains: one sampler over all its leases, new weights in the middle of completions.

With ``rollout.in_flight_updates``. Groups of the next run of leases take the places that get free, and a version is
adopted between two decoding steps as soon as it is there. Every token keeps the number of the version that sampled
it; as versions only rise, a group is as old as the first token of its first completion.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from grpo_actors.messages import Grant, read_ints
from grpo_actors.policy.sampling import Sampler, places_for
from grpo_actors.worker import RolloutWorker, sampling_params


@dataclass
class InFlightWorker(RolloutWorker):
    """A worker whose `turn` is one decoding step; for a process of its own."""

    _sampler: Sampler = field(init=False)
    #: Seconds of each group in `_sampling`: its share of the steps since it was submitted.
    _sampling_s: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rollout, params = self.config.rollout, sampling_params(self.config)
        completions = rollout.batch_groups * rollout.num_generations
        places = places_for(self.policy, completions, self.config.data.max_prompt_length, params)
        self._sampler = Sampler(self.policy, params, places, self.version)

    def turn(self, wait_s: float) -> None:
        """Hear what there is (waiting `wait_s` for it when idle), adopt, and decode one token of every completion."""
        self._listen(wait_s)
        while self._can_sample():
            self._begin(self._grants.popleft())
        if self._sampling:
            self._step()
            self._book()
            # Out of work: told at once, as at the end of a batch.
            self._beat("sampling" if self._sampling else "waiting", force=not self._sampling)

    def _has_work(self) -> bool:
        return bool(self._sampling) or self._can_sample()

    def _load(self, arrays: Mapping[str, mx.array]) -> None:
        self._sampler.adopt(self.version, arrays)

    def _forget(self) -> None:
        self._drop(list(self._sampling))
        super()._forget()

    def _drop_older(self, newer: Grant) -> None:
        super()._drop_older(newer)
        self._drop([lease.lease for lease in newer.leases])

    def _drop(self, leases: Iterable[int]) -> None:
        for lease in self._sampling.keys() & leases:
            self._sampler.drop(lease)
            del self._sampling[lease], self._sampling_s[lease]

    def _begin(self, grant: Grant) -> None:
        for lease in grant.leases:
            prompt = read_ints(lease.prompt)
            self._sampler.submit(lease.lease, prompt, lease.seeds, self._respond(lease))
            self._sampling[lease.lease], self._sampling_s[lease.lease] = lease, 0.0

    def _step(self) -> None:
        started_s = time.monotonic()
        tokens, done = self._sampler.step()
        share_s = (time.monotonic() - started_s) / len(self._sampling)
        self._sampling_s = {lease: seconds + share_s for lease, seconds in self._sampling_s.items()}
        self._tokens += tokens
        for lease, samples in done:
            # Held until it is on its way: a beat while it is scored must not say that nobody has the lease.
            self._deliver(self._score(self._sampling[lease], samples, self._sampling_s[lease]))
            del self._sampling[lease], self._sampling_s[lease]
