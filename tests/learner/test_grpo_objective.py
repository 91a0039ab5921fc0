"""The settings of section [objective] on the embedded model's completions, against numbers computed in the test."""

import mlx.core as mx
import numpy as np
import pytest
from hand_made import MAX_NEW, REWARDS, changed, config, groups_of, learner, logprobs_under, weights

from grpo_actors.config import load_config
from grpo_actors.config.objective import PRESETS
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import load_policy

R = np.array(REWARDS)
#: (R − mean) / (sample deviation + 1e-4) in each group.
A = (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def lengths_of(groups):
    return np.array([[len(c.tokens) for c in group.completions] for group in groups])


def entropies_of(policy, groups):
    """Return the entropies of every token of each completion, computed one completion at a time."""
    found = []
    for group in groups:
        for completion in group.completions:
            _, entropy = completion_logprobs(
                policy.model,
                mx.array([[*group.prompt, *completion.tokens]]),
                mx.array([len(group.prompt) - 1]),
                mx.array([completion.tokens]),
                1.0,
            )
            found.append(np.array(entropy)[0])
    return found


def recorded_lower(groups, shift):
    """Return the groups as sent by a worker whose log-probs are all lower by `shift`."""
    for g, group in enumerate(groups):
        for i, c in enumerate(group.completions):
            groups = changed(groups, g, i, logprobs=[x - shift for x in c.logprobs])
    return groups


# --- ratio and correction -------------------------------------------------------------------------


def test_a_recorded_ratio_is_against_the_worker():
    grpo = learner(config(clip_eps_high=10.0))
    groups = recorded_lower(groups_of(grpo.policy), 0.1)
    metrics = grpo.update(groups)
    # Every ratio is e^0.1, and no clip reaches it for A > 0 nor, from above, for A < 0.
    tokens = lengths_of(groups)
    assert metrics["ratio_mean"] == pytest.approx(np.exp(0.1), rel=1e-4)
    assert metrics["loss"] == pytest.approx(-np.exp(0.1) * (A * tokens).sum() / tokens.sum(), abs=1e-5)
    assert metrics["logprob_gap_mean"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("correction", "cap", "weight"),
    [
        ("none", 3.0, 1.0),
        ("token_truncate", 3.0, np.exp(0.1)),
        ("token_truncate", 1.05, 1.05),
        ("token_mask", 1.05, 0.0),
    ],
)
def test_a_recomputed_ratio_starts_at_one_and_the_correction_weighs_the_loss(correction, cap, weight):
    settings = config(ratio="recomputed", correction=correction, correction_cap=cap)
    grpo = learner(settings)
    groups = recorded_lower(groups_of(grpo.policy), 0.1)
    metrics = grpo.update(groups)
    tokens = lengths_of(groups)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(-weight * (A * tokens).sum() / tokens.sum(), abs=1e-5)
    assert metrics["mismatch_kl"] == pytest.approx(np.exp(0.1) - 1.1, rel=2e-3)
    assert metrics["correction_share"] == (1.0 if cap < np.exp(0.1) else 0.0)


def test_a_sequence_weight_is_the_product_over_its_tokens():
    grpo = learner(config(ratio="recomputed", correction="sequence_truncate", correction_cap=5.0))
    groups = recorded_lower(groups_of(grpo.policy), 0.05)
    metrics = grpo.update(groups)
    tokens = lengths_of(groups)
    w = np.minimum(np.exp(0.05 * tokens), 5.0)
    assert metrics["loss"] == pytest.approx(-(w * A * tokens).sum() / tokens.sum(), abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [("two_sided", {"clip_delta": 1.5}), ("dual_clip", {"dual_clip": 1.5}), ("clip", {})],
)
def test_the_share_of_tokens_that_the_second_bound_cut_is_reported(loss, settings):
    grpo = learner(config(loss=loss, **settings))
    groups = recorded_lower(groups_of(grpo.policy), np.log(2.0))
    metrics = grpo.update(groups)
    # Every ratio is 2: beyond 1.5 where A < 0, and beyond 1.2, the first clip, where A > 0.
    tokens = lengths_of(groups)
    assert metrics["clip_share"] == pytest.approx((tokens * (A > 0)).sum() / tokens.sum())
    if settings:
        assert metrics["clip_delta_share"] == pytest.approx((tokens * (A < 0)).sum() / tokens.sum())
    else:
        assert metrics["clip_delta_share"] is None, "the loss has no such bound"


# --- shaping --------------------------------------------------------------------------------------


def test_the_overlong_penalty_is_one_more_reward():
    grpo = learner(config(overlong_tokens=20))
    groups = groups_of(grpo.policy)
    # L_max = 24, L_c = 20: 0 up to 4 tokens, then linear to −1 at 24.
    penalty = -np.clip((lengths_of(groups) - 4) / 20, 0.0, 1.0)
    assert penalty.min() < -0.2
    metrics = grpo.update(groups)
    assert metrics["reward_mean"] == pytest.approx((R + penalty).mean())
    shaped = R + penalty
    expected = (shaped - shaped.mean(axis=1, keepdims=True)) / (
        shaped.std(axis=1, ddof=1, keepdims=True) + 1e-4
    )
    tokens = lengths_of(groups)
    assert metrics["loss"] == pytest.approx(-(expected * tokens).sum() / tokens.sum(), abs=1e-5)


def test_truncated_completions_leave_the_loss_and_its_denominator():
    grpo = learner(config(mask_truncated=True, temperature=2.0))
    groups = groups_of(grpo.policy, temperature=2.0)
    tokens = lengths_of(groups)
    ended = np.array([[c.finished for c in group.completions] for group in groups])
    assert 0 < ended.sum() < ended.size, "some of each, or this shows nothing"
    metrics = grpo.update(groups)
    assert metrics["loss"] == pytest.approx(-(A * tokens * ended).sum() / (tokens * ended).sum(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_only_the_uncertain_tokens_of_the_whole_update_train(batch_size):
    accumulation = 4 // batch_size
    grpo = learner(
        config(top_entropy_share=0.3, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    )
    groups = groups_of(grpo.policy)
    entropies = entropies_of(grpo.policy, groups)
    threshold = np.quantile(np.concatenate(entropies).astype(np.float64), 0.7)
    kept = np.array([(h >= threshold).sum() for h in entropies])
    metrics = grpo.update(groups)
    # The others keep their place in the denominator.
    assert metrics["loss"] == pytest.approx(-(A.ravel() * kept).sum() / lengths_of(groups).sum(), abs=1e-4)


def test_the_entropy_bonus_alone_makes_the_policy_less_certain():
    grpo = learner(config(entropy_coeff=0.1, learning_rate=1e-3))
    groups = groups_of(grpo.policy, [[1.0] * 4] * 4)  # no advantage: nothing else moves a weight
    mean = np.concatenate(entropies_of(grpo.policy, groups)).mean()
    metrics = [grpo.update(groups) for _ in range(3)]
    assert metrics[0]["entropy"] == pytest.approx(mean, rel=1e-4)
    assert metrics[0]["loss"] == pytest.approx(-0.1 * mean, rel=1e-4)
    assert metrics[0]["entropy"] < metrics[1]["entropy"] < metrics[2]["entropy"]


# --- the reference --------------------------------------------------------------------------------


def test_a_reference_that_is_refreshed_moves_by_its_share_every_so_many_updates():
    grpo = learner(config(kl_coeff=0.1, reference_refresh_updates=2, reference_refresh_alpha=0.25))
    start, groups = weights(grpo), groups_of(grpo.policy)

    def reference():
        return {name: np.array(array) for name, array in grpo.reference.items()}

    grpo.update(groups)
    assert all((reference()[name] == start[name]).all() for name in start)
    grpo.update(groups)
    for name, policy in weights(grpo).items():
        np.testing.assert_allclose(reference()[name], 0.25 * policy + 0.75 * start[name], atol=1e-7)


def test_without_a_reference_no_kl_is_reported():
    grpo = learner(config(kl_coeff=0.0))
    assert grpo.update(groups_of(grpo.policy))["kl"] is None


def test_a_reference_that_becomes_the_policy_has_no_kl_to_it():
    grpo = learner(config(kl_coeff=0.1, reference_refresh_updates=1, reference_refresh_alpha=1.0))
    groups = groups_of(grpo.policy)
    assert [grpo.update(groups)["kl"] for _ in range(3)] == pytest.approx([0.0] * 3, abs=1e-7)
    still = learner(config(kl_coeff=0.1))
    assert [still.update(groups)["kl"] for _ in range(3)][2] > 1e-5


# --- algorithms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", PRESETS)
def test_every_algorithm_by_name_makes_good_completions_likelier_than_bad_ones(algorithm):
    settings = load_config(
        None,
        [
            f"algorithm={algorithm}",
            *("functions={hand=1.0}", "num_generations=4", f"max_new_tokens={MAX_NEW}", "learning_rate=1e-4"),
            *("batch_size=2", "gradient_accumulation_steps=2", "warmup_ratio=0"),
        ],
    ).config
    grpo = learner(settings, load_policy(settings.model, seed=0))
    groups = groups_of(grpo.policy)

    def likelihoods():
        return np.array([[logprobs_under(grpo.policy, g, c).sum() for c in g.completions] for g in groups])

    before = likelihoods()
    metrics = grpo.update(groups)
    moved = likelihoods() - before
    assert metrics["grad_norm"] > 0
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert ((R - R.mean(axis=1, keepdims=True)) * moved).sum() > 0
