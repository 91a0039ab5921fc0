"""Log-probs and rewards that are not finite must not reach the weights."""

import math

import numpy as np
import pytest
from hand_made import REWARDS, assert_same_weights, changed, config, groups_of, learner, weights

from grpo_actors.errors import TrainingError
from grpo_actors.learner.grpo import MAX_SKIPPED_IN_A_ROW


def test_a_log_prob_that_is_no_number_drops_the_step_and_is_counted():
    grpo = learner(config())
    groups = groups_of(grpo.policy)
    before = weights(grpo)
    metrics = grpo.update(changed(groups, 2, 0, logprobs=[math.nan] * len(groups[2].completions[0].tokens)))
    assert metrics["skipped_steps"] == 1
    assert_same_weights(before, weights(grpo))
    assert grpo.version == 1
    assert grpo.update(groups)["skipped_steps"] == 1, "the next good batch is a step"
    assert grpo.skipped_in_a_row == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_log_prob_ends_at_the_clamp_of_the_ratio(bad):
    grpo = learner(config())
    groups = groups_of(grpo.policy)
    grpo.update(changed(groups, 2, 0, logprobs=[bad] * len(groups[2].completions[0].tokens)))
    assert all(np.isfinite(array).all() for array in weights(grpo).values())


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e300])
def test_a_reward_that_is_no_number_leaves_its_completion_out(bad):
    grpo = learner(config())
    metrics = grpo.update(changed(groups_of(grpo.policy), 0, 1, rewards={"hand": bad}))
    assert metrics["invalid_completions"] == 1
    assert metrics["skipped_steps"] == 0
    assert all(np.isfinite(array).all() for array in weights(grpo).values())


def test_a_batch_without_any_valid_reward_changes_nothing():
    grpo = learner(config())
    before = weights(grpo)
    metrics = grpo.update(groups_of(grpo.policy, [[math.nan] * 4, [None] * 4]))
    assert (metrics["invalid_completions"], metrics["reward_mean"], metrics["loss"]) == (8, None, 0.0)
    assert_same_weights(before, weights(grpo))
    assert grpo.version == 1


def test_ten_steps_in_a_row_without_a_finite_gradient_end_the_run():
    grpo = learner(config(), total=100)
    good = groups_of(grpo.policy, REWARDS[:1])
    bad = changed(good, 0, 0, logprobs=[math.nan] * len(good[0].completions[0].tokens))
    before = weights(grpo)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        grpo.update(bad)
    assert_same_weights(before, weights(grpo))
    grpo.update(good)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        grpo.update(bad)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        grpo.update(bad)
