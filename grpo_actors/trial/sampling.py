"""Sample and score a few groups in this process, as a worker does, within a limit of time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from grpo_actors.config import Config
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.policy.decoding.draw import Respond
from grpo_actors.policy.model import Policy
from grpo_actors.rollout.episodes import Episodes
from grpo_actors.rollout.lease_sampler import LeaseSampler, LeaseSamples
from grpo_actors.rollout.results import problem_of, score_group
from grpo_actors.rollout.worker import sampling_params
from grpo_actors.schedule.lease import Granted
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.wire.messages import Lease


@dataclass
class Sampled:
    """The groups of a trial."""

    groups: list[SampledGroup] = field(default_factory=list)
    #: Seconds of sampling, and of each reward function, for all groups.
    sampling_s: float = 0.0
    reward_s: dict[str, float] = field(default_factory=dict)
    #: Whether the time ended before a group was whole: the completions of the only groups are cut where they were then.
    cut: bool = False

    @property
    def completions(self) -> list[SampledCompletion]:
        """All completions, group by group."""
        return [completion for group in self.groups for completion in group.completions]

    @property
    def failures(self) -> dict[str, str]:
        """Reward that failed, or "environment" -> its first error."""
        return {name: text for group in reversed(self.groups) for name, text in group.failures.items()}

    @property
    def tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(sum(completion.sampled) for completion in self.completions)


def sample_groups(
    config: Config,
    policy: Policy,
    supply: Supply,
    scorer: Scorer,
    episodes: Episodes | None,
    *,
    within_s: float,
) -> Sampled:
    """Sample the groups of one update, or as many as there is time for, and score them.

    The groups are the first ones of the run, with the same seeds, so their completions are those that its first update
    will train on. They are sampled a run of leases at a time, as workers do. None begins after half of the time.

    Args:
        config: The settings, with `reward.functions` resolved.
        policy: In the state in which it trains.
        supply: The problems of the run.
        scorer: Computes the rewards.
        episodes: Replies to turns; None: completions have one turn.
        within_s: Seconds for sampling. Groups under way then are dropped if others are whole, else taken as they are.
    """

    def respond(lease: Lease) -> Respond | None:
        return episodes.of(problem_of(lease)) if episodes else None

    def score(sampling: LeaseSamples) -> SampledGroup:
        message = score_group(
            *(sampling.lease, sampling.samples, policy, scorer),
            sampling_s=sampling.sampling_s,
            grade=config.reward.grade,
        )
        position = sampling.lease.lease
        epoch, problem = supply.problem(position)
        completions = [SampledCompletion.read(completion) for completion in message.completions]
        prompt, failures = supply.prompt(position), message.failures
        return SampledGroup(position, epoch, problem, prompt, "trial", completions, failures=failures)

    sampler = LeaseSampler(policy, config, sampling_params(config), respond)
    sampled, positions = Sampled(), supply.posed()
    began_s = time.monotonic()
    while len(sampled.groups) < config.groups_per_update and (
        not sampled.groups or time.monotonic() - began_s < within_s / 2
    ):
        # They divide the groups of an update (`config.rules`).
        leases = [_lease(supply, position) for position in islice(positions, config.rollout.batch_groups)]
        started_s = time.monotonic()
        done = _sample(sampler, leases, until_s=began_s + within_s)
        sampled.sampling_s += time.monotonic() - started_s
        if not done and not sampled.groups:
            done, sampled.cut = [each for each in sampler.leases.values() if _has_begun(each)], True
        sampled.groups += map(score, done)
        sampler.drop(list(sampler.leases))
        if len(done) < len(leases):
            break  # the time has ended
    sampled.reward_s = dict(scorer.seconds)
    return sampled


def _lease(supply: Supply, position: int) -> Lease:
    return supply.lease_message(Granted(position, attempt=1, min_version=0, token=0))


def _sample(sampler: LeaseSampler, leases: Sequence[Lease], *, until_s: float) -> list[LeaseSamples]:
    """Sample the leases until all are whole or the time ends; return the whole ones."""
    sampler.begin(leases, version=0)
    while not all(sampling.whole for sampling in sampler.leases.values()) and time.monotonic() < until_s:
        sampler.step()
    return [sampling for sampling in sampler.leases.values() if sampling.whole]


def _has_begun(sampling: LeaseSamples) -> bool:
    """Return whether each completion has a token."""
    return all(sample.tokens for sample in sampling.samples)
