"""The ranks of a worker after the first: they hold their parts of its model, and compute what rank 0 computes (`leading`).

They know no run, no socket and no reward.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from grpo_actors import consent
from grpo_actors.config import Config
from grpo_actors.errors import GrpoActorsError, ProtocolError
from grpo_actors.failpoints import reach
from grpo_actors.policy.decoding.draw import Respond, Sample
from grpo_actors.policy.model import Policy
from grpo_actors.process import bound_memory
from grpo_actors.ranks.group import RankGroup, dtype_of, join
from grpo_actors.rollout.leading import load_part
from grpo_actors.rollout.lease_sampler import LeaseSampler
from grpo_actors.rollout.worker import sampling_params
from grpo_actors.transport.links import LinkClosedError
from grpo_actors.wire.messages import Grant, Lease, decode, from_learner


def follow(allowed: Sequence[str]) -> int:
    """Be a rank after the first, from its start to its end; return the exit code of the process.

    Args:
        allowed: Names of the code that the settings may run (`consent`).
    """
    bound_memory()
    with contextlib.suppress(LinkClosedError):
        follower = Follower(join(), allowed)
        while True:
            follower.turn()
    return 0


class Follower:
    """One of these ranks: its part of the model, and its sampler."""

    def __init__(self, group: RankGroup, allowed: Sequence[str] = ()) -> None:
        self._group, self._allowed = group, allowed
        self._policy: Policy | None = None
        self._sampler: LeaseSampler | None = None

    def turn(self) -> None:
        """Do the next thing that rank 0 does.

        Raises:
            LinkClosedError: Rank 0 has ended in order.
        """
        match self._group.hear():
            case {"do": "load", "config": config}:
                self._load(Config.model_validate(config))
            case {"do": "sample", "config": config}:
                self._sampler = self._new_sampler(Config.model_validate(config))
            case {"do": "begin", "version": version}:
                grant = decode(from_learner, self._group.receive())
                assert isinstance(grant, Grant)
                self._sampling.begin(grant.leases, version)
            case {"do": "step"}:
                reach("rank.sampling")
                with self._group.computing():
                    self._sampling.step()
            case {"do": "drop", "leases": leases}:
                self._sampling.drop(leases)
            case {"do": "adopt", "version": version, "arrays": described}:
                self._sampling.adopt(version, self._group.from_first(_shaped(described)))
            case other:
                raise ProtocolError(f"rank {self._group.rank}: cannot do {other}")

    @property
    def _sampling(self) -> LeaseSampler:
        assert self._sampler is not None
        return self._sampler

    def _load(self, config: Config) -> None:
        consent.check(consent.code_of_model(config.model), self._allowed, "the settings of rank 0")
        # Rank 0 is told, and decides.
        with contextlib.suppress(GrpoActorsError):
            self._policy = load_part(self._group, config)

    def _new_sampler(self, config: Config) -> LeaseSampler:
        assert self._policy is not None
        self._policy.chat.use(config.data.chat_template, config.data.chat_template_kwargs)
        return LeaseSampler(self._policy, config, sampling_params(config), self._respond)

    def _respond(self, lease: Lease) -> Respond | None:
        del lease
        return self._reply if self._group.hear() else None

    def _reply(self, sample: Sample) -> Sequence[int] | None:
        del sample
        reply: Sequence[int] | None = self._group.hear()
        return reply


def _shaped(described: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return arrays of these shapes and types; nothing is computed."""
    return {name: mx.zeros(shape, dtype_of(dtype)) for name, (shape, dtype) in described.items()}
