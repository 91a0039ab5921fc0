"""The gap of each completion between its worker's log-probs and the learner's, as an update measures it."""

from dataclasses import replace

import pytest
from hand_made import config, groups_of, learner

from grpo_actors.schedule.quarantine import Gap


def of_worker(group, worker, *, off=0.0, version=0):
    """Return the group as if a worker had sampled it with a version, and reported log-probs that are `off` too low."""
    completions = [
        replace(c, logprobs=[p - off for p in c.logprobs], versions=[version] * len(c.tokens))
        for c in group.completions
    ]
    return replace(group, worker=worker, completions=completions)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"ratio": "recomputed"}])
def test_the_gap_of_each_worker_is_measured_before_the_batch_moves_the_policy(settings):
    grpo = learner(config(**settings))
    a, b, c, d = groups_of(grpo.policy)
    grpo.version = 3
    groups = [
        of_worker(a, "fair", version=3),
        of_worker(b, "liar", off=0.5, version=3),
        of_worker(c, "fair", version=3),
        of_worker(d, "liar", off=0.25, version=1),
    ]
    metrics = grpo.update(groups)
    tokens = [[len(completion.tokens) for completion in group.completions] for group in groups]
    assert metrics["logprob_gaps"].keys() == {"fair", "liar"}
    assert metrics["logprob_gaps"]["fair"] == pytest.approx(0.0, abs=1e-4)
    expected = (0.5 * sum(tokens[1]) + 0.25 * sum(tokens[3])) / sum(tokens[1] + tokens[3])
    assert metrics["logprob_gaps"]["liar"] == pytest.approx(expected, abs=1e-4)
    for group, lengths, off, lag in zip(groups, tokens, (0, 0.5, 0, 0.25), (0, 0, 0, 2), strict=True):
        assert grpo.gaps[group.lease] == [
            Gap(lag, length, pytest.approx(off * length, abs=1e-2)) for length in lengths
        ]
    total = sum(gap.nats for of_lease in grpo.gaps.values() for gap in of_lease)
    assert total == pytest.approx(metrics["logprob_gap_mean"] * metrics["tokens"], rel=1e-4)


def test_completions_that_are_not_computed_have_no_gap():
    grpo = learner(config(skip_zero_advantage=True))
    rewards = [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.5, None]]  # the first group has no advantage
    a, b = groups_of(grpo.policy, rewards)
    metrics = grpo.update([of_worker(a, "idle"), of_worker(b, "w", off=1.0)])
    # The second one's mean is 0.5, so its third completion has no advantage; its fourth has no reward.
    assert [len(grpo.gaps[lease]) for lease in (0, 1)] == [0, 2]
    assert metrics["logprob_gaps"] == {"w": pytest.approx(1.0, abs=1e-4)}


def test_the_tokens_of_an_environment_have_no_gap():
    grpo = learner(config())
    group, *others = groups_of(grpo.policy)
    long = next(i for i, c in enumerate(group.completions) if len(c.tokens) > 6)
    marked = replace(group.completions[long], inserted=[2, 5])
    wrong = [p if s else 0.0 for p, s in zip(marked.logprobs, marked.sampled, strict=True)]
    completions = [*group.completions[:long], replace(marked, logprobs=wrong), *group.completions[long + 1 :]]
    grpo.update([replace(group, completions=completions), *others])
    gap = grpo.gaps[0][long]
    assert gap.tokens == len(marked.tokens) - 3
    assert gap.nats < 1e-2


def test_with_recorded_groups_the_ratio_of_each_token_is_kept_and_the_update_is_the_same():
    recorded, plain = learner(config(record_groups=True)), learner(config())
    groups = [
        of_worker(group, "w", off=0.25 * number) for number, group in enumerate(groups_of(plain.policy))
    ]
    assert recorded.update(groups)["loss"] == plain.update(groups)["loss"]
    assert plain.log_ratios == {}
    numbered = enumerate(c for group in groups for c in group.completions)
    per_group = len(groups[0].completions)
    for number, completion in numbered:
        tokens = len(completion.tokens)
        off = 0.25 * (number // per_group)
        assert recorded.log_ratios[number][:tokens] == pytest.approx([off] * tokens, abs=1e-3)
