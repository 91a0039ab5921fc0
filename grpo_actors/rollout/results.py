"""Score the samples of a lease and build the `Group` message that goes to the learner."""

import time
from collections.abc import Sequence

from grpo_actors.policy.decoding.draw import Sample
from grpo_actors.policy.model import Policy
from grpo_actors.rollout.episodes import chat_of
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem
from grpo_actors.wire.messages import Completion, Group, Lease, floats, ints


def problem_of(lease: Lease) -> Problem:
    """Return the problem that a lease carries."""
    return Problem(
        lease.problem_id,
        tuple(lease.messages),
        lease.answer,
        lease.columns,
        text_prompt=lease.text_prompt,
        source=lease.source,
    )


def score_group(
    lease: Lease, samples: Sequence[Sample], policy: Policy, scorer: Scorer, *, sampling_s: float
) -> Group:
    """Score the samples of a lease and return them as its group.

    A completion whose environment failed gets no reward, so that it does not train.
    """
    started_s = time.monotonic()
    chats = [chat_of(policy, sample) for sample in samples]
    scores = scorer.score(problem_of(lease), chats)
    completions = [
        Completion(
            tokens=ints(sample.tokens),
            logprobs=floats(sample.logprobs),
            versions=ints(sample.versions),
            finished=sample.finished,
            inserted=ints(sample.spans),
            rewards={name: None if sample.failure else given[i] for name, given in scores.rewards.items()},
        )
        for i, sample in enumerate(samples)
    ]
    failures = dict.fromkeys(sample.failure for sample in samples if sample.failure)
    return Group(
        lease=lease.lease,
        attempt=lease.attempt,
        token=lease.token,
        completions=completions,
        sampling_s=sampling_s,
        scoring_s=time.monotonic() - started_s,
        failures=[*scores.failures, *failures],
    )
