"""Rank 0 of a worker whose model is divided among ranks: it lets the others compute whatever it computes (`following`).

Every rank has a sampler of its own, with the same leases and seeds. Before rank 0 takes a step it tells the others to take
it too. Tokens are those of rank 0 (`policy.decoding.step`), so that all samplers go the same way. Only rank 0 has sockets,
rewards and environments; the others are told an environment's replies. New weights reach them through the collectives.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx

from grpo_actors.config import Config
from grpo_actors.config.model_rules import divided_worker
from grpo_actors.errors import ConfigError, GrpoActorsError, ModelError
from grpo_actors.policy.decoding.draw import Respond, Sample, SamplingParams
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.ranks.group import RankGroup, join, name_of
from grpo_actors.rollout.lease_sampler import LeaseSampler, LeaseSamples
from grpo_actors.wire.messages import Grant, Lease, encode


class LeadingSampler(LeaseSampler):
    """The leases that a worker of several ranks is sampling."""

    def __init__(
        self,
        group: RankGroup,
        policy: Policy,
        config: Config,
        params: SamplingParams,
        respond: Callable[[Lease], Respond | None],
    ) -> None:
        """Begin without leases, on all ranks; arguments as those of the base class."""
        super().__init__(policy, config, params, respond=partial(self._respond, respond))
        self._group = group
        group.tell({"do": "sample", "config": config.model_dump(mode="json")})

    def begin(self, leases: Sequence[Lease], version: int) -> None:
        """As the base class."""
        self._group.tell({"do": "begin", "version": version})
        self._group.send(encode(Grant(leases=list(leases))))
        super().begin(leases, version)

    def step(self) -> tuple[int, list[LeaseSamples]]:
        """As the base class."""
        self._group.tell({"do": "step"})
        with self._group.computing():
            return super().step()

    def drop(self, leases: Iterable[int]) -> None:
        """As the base class."""
        if dropped := list(self.leases.keys() & set(leases)):
            self._group.tell({"do": "drop", "leases": dropped})
            super().drop(dropped)

    def adopt(self, version: int, arrays: Mapping[str, mx.array]) -> None:
        """As the base class."""
        described = {name: (array.shape, name_of(array.dtype)) for name, array in arrays.items()}
        self._group.tell({"do": "adopt", "version": version, "arrays": described})
        super().adopt(version, self._group.from_first(arrays))

    def _respond(self, respond: Callable[[Lease], Respond | None], lease: Lease) -> Respond | None:
        reply = respond(lease)
        self._group.tell(reply is not None)
        return None if reply is None else partial(self._reply, reply)

    def _reply(self, respond: Respond, sample: Sample) -> Sequence[int] | None:
        reply = respond(sample)
        self._group.tell(reply)
        return reply


@contextlib.contextmanager
def leading(ranks: int) -> Iterator[RankGroup | None]:
    """Join the other ranks of this worker, which were started with it, until the block ends; None if there are none."""
    if ranks == 1:
        yield None
        return
    group = join()
    yield group
    group.close()  # not after an error: a rank that waits in a collective ends only if its link breaks


def load_together(group: RankGroup, config: Config) -> Policy:
    """Load the model of the settings on all ranks, each its part.

    Raises:
        GrpoActorsError: As `load_policy`, on any of them; or the settings allow no divided model.
    """
    # A worker that a user attaches may have more ranks than the run's own.
    for broken in divided_worker(config, group.size):
        raise ConfigError(f"{broken.keys[0]} {broken.rule}, got {broken.value}")
    group.tell({"do": "load", "config": config.model_dump(mode="json")})
    return load_part(group, config)


def load_part(group: RankGroup, config: Config) -> Policy:
    """Load this rank's part of the model of the settings; every rank does. Raises as `load_together`."""
    failure = None
    try:
        policy = load_policy(config.model, seed=config.run.seed, group=group.collectives)
    except GrpoActorsError as error:
        failure = error
    failures = [text for text in group.ask(None if failure is None else str(failure)) if text]
    if failure is not None:
        raise failure
    if failures:
        raise ModelError(failures[0])
    return policy
