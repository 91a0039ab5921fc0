"""Score the samples of a lease and build the `Group` message that goes to the learner."""

import time
from collections.abc import Sequence

from grpo_actors.config.data import Grade
from grpo_actors.policy.decoding.draw import Sample
from grpo_actors.policy.model import Policy
from grpo_actors.rollout.episodes import judged
from grpo_actors.tasks.failures import ENVIRONMENT
from grpo_actors.tasks.scoring import Scorer, TrainerState
from grpo_actors.tasks.task import Problem
from grpo_actors.wire.messages import Completion, Group, Lease, floats, ints, read_ints


def problem_of(lease: Lease) -> Problem:
    """Return the problem that a lease carries."""
    return Problem(
        lease.problem_id,
        tuple(lease.messages),
        lease.answer,
        lease.columns,
        text_prompt=lease.text_prompt,
        mathematics=lease.mathematics,
        source=lease.source,
    )


def score_group(
    lease: Lease,
    samples: Sequence[Sample],
    policy: Policy,
    scorer: Scorer,
    *,
    total_updates: int = 0,
    sampling_s: float,
    grade: Grade = "after_think",
) -> Group:
    """Score the samples of a lease and return them as its group; for `grade` see `judged`.

    A completion whose environment failed gets no reward, so that it does not train.
    """
    started_s = time.monotonic()
    prompt = read_ints(lease.prompt)
    chats, thoughts = zip(*(judged(policy, prompt, sample, grade) for sample in samples), strict=True)
    scorer.trainer_state = TrainerState(samples[0].versions[0], total_updates, lease.epoch)
    scores = scorer.score(problem_of(lease), chats, [sample.tokens for sample in samples], thoughts=thoughts)
    completions = [
        Completion(
            tokens=ints(sample.tokens),
            logprobs=floats(sample.logprobs),
            versions=ints(sample.versions),
            finished=sample.finished,
            inserted=ints(sample.spans),
            forced=ints(sample.forced),
            rewards={name: None if sample.failure else given[i] for name, given in scores.rewards.items()},
            extra={column: values[i] for column, values in scores.logs.extra.items()},
        )
        for i, sample in enumerate(samples)
    ]
    failed = [sample.failure for sample in samples if sample.failure]
    return Group(
        lease=lease.lease,
        attempt=lease.attempt,
        token=lease.token,
        completions=completions,
        sampling_s=sampling_s,
        scoring_s=time.monotonic() - started_s,
        logged=scores.logs.metrics,
        failures=scores.failures | ({ENVIRONMENT: failed[0]} if failed else {}),
    )
