"""The update on the embedded model, with groups made by hand: metrics and weights follow the formulas."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hand_made import (
    MAX_NEW,
    REWARDS,
    assert_same_weights,
    config,
    groups_of,
    learner,
    logprobs_under,
    weights,
)

from grpo_actors.learner.grpo import _alone
from grpo_actors.learner.ranks import Ranks
from grpo_actors.objective.micro_batches import Completion, Layout, pack
from grpo_actors.policy.model import load_base, load_policy

# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_on_policy_the_loss_is_minus_the_mean_advantage(aggregation, temperature):
    grpo = learner(config(aggregation=aggregation, temperature=temperature))
    groups = groups_of(grpo.policy, temperature=temperature)
    metrics = grpo.update(groups)

    # π = π_old: r = 1 for every token, so that L_t = −A with any clip.
    R = np.array(REWARDS)
    A = (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    lengths = np.array([[len(c.tokens) for c in group.completions] for group in groups])
    expected = {
        "grpo": -A.mean(),
        "dapo": -(A * lengths).sum() / lengths.sum(),
        "dr_grpo": -(A * lengths).sum() / (A.size * MAX_NEW),
    }[aggregation]
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_share"] == 0.0
    assert metrics["logprob_gap_max"] < 1e-4
    assert metrics["tokens"] == lengths.sum()
    assert metrics["reward_mean"] == pytest.approx(R.mean())
    assert metrics["staleness"] == {"0": 4}


def test_one_update_makes_the_rewarded_completion_likelier_and_the_surrogate_larger():
    # Hot, so that the four are sure to differ.
    grpo = learner(config(learning_rate=1e-5, temperature=2.0))
    groups = groups_of(grpo.policy, [[0.0, 0.0, 0.0, 1.0]], temperature=2.0)
    A = np.array([-0.5, -0.5, -0.5, 1.5])  # (R − 1/4) / (1/2), the sample deviation

    def likelihoods():
        return np.array([logprobs_under(grpo.policy, groups[0], c).sum() for c in groups[0].completions])

    before = likelihoods()
    grpo.update(groups)
    after = likelihoods()
    assert after[3] > before[3]
    assert (A * (after - before)).sum() > 0


def test_further_iterations_on_one_batch_meet_the_clip():
    groups = groups_of(learner(config()).policy)
    once = learner(config(num_iterations=1)).update(groups)
    often = learner(config(num_iterations=5, learning_rate=5e-3)).update(groups)
    assert once["clip_share"] == 0.0
    assert often["clip_share"] > 0.0
    assert often["ratio_max"] > 1.2
    assert often["logprob_gap_max"] < 1e-4, "the gap is that before the batch moved the policy"


@pytest.mark.parametrize("skips", [False, True])
def test_groups_of_equal_rewards_teach_nothing(skips):
    grpo = learner(config(adam_beta1=0.0, skip_zero_advantage=skips))
    before = weights(grpo)
    metrics = grpo.update(groups_of(grpo.policy, [[1.0] * 4, [0.0] * 4]))
    assert metrics["zero_variance_share"] == 1.0
    assert metrics["grad_norm"] == 0.0
    assert (metrics["entropy"] is None) == skips, "nothing was computed"
    assert_same_weights(before, weights(grpo))


MIXED = [[1.0, 0.0, 1.0, 0.0], [1.0] * 4, [0.0] * 4]


def test_completions_of_no_advantage_are_not_computed_and_the_step_is_the_same():
    every, some = (
        learner(config(skip_zero_advantage=skips, max_grad_norm=0.0, weight_decay=0.1))
        for skips in (False, True)
    )
    groups, before = groups_of(every.policy, MIXED), weights(every)
    metrics_of_every, metrics = every.update(groups), some.update(groups)
    for name, array in weights(every).items():
        # On the mean: Adam makes a whole step of a gradient that is nothing but rounding.
        assert np.abs(array - weights(some)[name]).mean() < 1e-3 * np.abs(array - before[name]).mean(), name
    assert metrics["grad_norm"] == pytest.approx(metrics_of_every["grad_norm"], rel=1e-4)
    assert metrics["loss"] == pytest.approx(metrics_of_every["loss"], abs=1e-6)
    assert metrics["tokens"] == metrics_of_every["tokens"], "all that were sampled"
    # The mean entropy of one group differs from that of three groups.
    assert metrics["entropy"] != pytest.approx(metrics_of_every["entropy"], rel=1e-3)


def test_an_update_without_any_advantage_takes_no_step():
    grpo = learner(config())
    grpo.update(groups_of(grpo.policy, MIXED))
    moved, steps = weights(grpo), grpo.training.optimizer.step.item()
    grpo.update(groups_of(grpo.policy, MIXED[1:]))
    assert_same_weights(moved, weights(grpo))
    assert grpo.training.optimizer.step.item() == steps


@pytest.mark.parametrize("term", [{"kl_coeff": 0.1}, {"entropy_coeff": 0.1}, {"top_entropy_share": 0.5}])
def test_where_the_loss_has_another_term_all_completions_are_computed(term):
    every, some = (learner(config(skip_zero_advantage=skips, **term)) for skips in (False, True))
    groups = groups_of(every.policy, MIXED)
    assert every.update(groups)["entropy"] == some.update(groups)["entropy"]
    assert_same_weights(weights(every), weights(some))


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [("lora", 0), ("lora", 4), ("dora", 0), ("dora", 4)])
def test_the_reference_of_an_adapter_is_the_base_also_after_updates(kind, bits):
    settings = config(
        model={"fine_tune_type": kind, "lora_rank": 4, "base_bits": bits}, kl_coeff=0.05, learning_rate=1e-2
    )
    grpo, base_policy = learner(settings), load_base(settings.model)
    groups = groups_of(grpo.policy, REWARDS[:2])
    first = grpo.update(groups)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    for _ in range(2):
        grpo.update(groups)
    expected = []
    for group in groups:
        for completion in group.completions:
            base = logprobs_under(base_policy, group, completion)
            with grpo.policy.holding(grpo.reference):
                off = logprobs_under(grpo.policy, group, completion)
            np.testing.assert_allclose(off, base, atol=1e-5)
            x = base - logprobs_under(grpo.policy, group, completion)
            expected += list(np.exp(x) - x - 1)  # k3
    assert np.mean(expected) > 1e-3
    assert grpo.update(groups)["kl"] == pytest.approx(np.mean(expected), rel=1e-3)


def test_the_reference_of_a_full_fine_tune_stays_where_it_was():
    settings = config(kl_coeff=0.05, learning_rate=1e-3)
    grpo = learner(settings)
    before = weights(grpo)
    groups = groups_of(grpo.policy)
    kls = [grpo.update(groups)["kl"] for _ in range(3)]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[2] > kls[0]
    assert_same_weights(before, {name: np.array(array) for name, array in grpo.reference.items()})


# --- the rest -------------------------------------------------------------------------------------


def test_the_rate_rises_from_the_first_update_on_and_falls_to_the_last():
    grpo = learner(
        config(warmup_ratio=0.4, lr_scheduler_type="linear", learning_rate=1e-4, num_iterations=2), total=5
    )
    groups = groups_of(grpo.policy, REWARDS[:1])
    rates = [grpo.update(groups)["learning_rate"] for _ in range(5)]
    # 10 steps, of which 4 warm up: steps 1, 3, 5, 7, 9 are reported, with 2/4, 4/4, 5/6, 3/6, 1/6 of the peak.
    assert rates == pytest.approx([5e-5, 1e-4, 5 / 6 * 1e-4, 5e-5, 1 / 6 * 1e-4])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_on_for_the_gradient_alone_and_the_same_after_a_resume(kind):
    def run(dropout, version=0):
        settings = config(
            model={"fine_tune_type": kind, "lora_rank": 4, "lora_dropout": dropout}, learning_rate=1e-2
        )
        grpo = learner(settings)
        grpo.version = version
        # B = 0 at first, so that dropout in A's input shows from the second step on.
        groups = groups_of(load_policy(settings.model, seed=0))
        mx.random.uniform()  # earlier draws must not matter
        grpo.update(groups)
        grpo.update(groups)
        assert not grpo.policy.model.training
        return weights(grpo)

    plain, dropped = run(0.0), run(0.5)
    assert any((plain[name] != dropped[name]).any() for name in plain)
    assert_same_weights(dropped, run(0.5))
    assert any((dropped[name] != other).any() for name, other in run(0.5, version=1).items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_log_probs_of_the_old_policy_and_of_the_reference_see_no_dropout(kind):
    adapter = {"fine_tune_type": kind, "lora_rank": 4}
    grpo = learner(config(model=adapter | {"lora_dropout": 0.9}, kl_coeff=0.1, learning_rate=1e-2))
    groups = groups_of(grpo.policy)
    grpo.update(groups)
    packed = pack(
        [Completion(group.prompt, c.tokens, c.logprobs, 1.0) for group in groups for c in group.completions],
        Layout(10**6, 16),
        aggregation="dapo",
        max_new_tokens=MAX_NEW,
    )
    plain = load_policy(config(model=adapter).model, seed=0)
    plain.load_trainable(grpo.policy.trainable())
    without = learner(config(model=adapter, kl_coeff=0.1), plain)
    without.reference = grpo.reference
    batches = [each._inputs(_alone(packed.micro_batches), Ranks()) for each in (grpo, without)]
    assert all("reference_logprobs" in arrays for arrays in batches[0])
    for arrays, expected in zip(*batches, strict=True):
        assert mx.array_equal(arrays["reference_logprobs"], expected["reference_logprobs"])
        old, _ = grpo._frozen_logprobs(arrays)
        assert mx.array_equal(old, without._frozen_logprobs(arrays)[0])
        assert not mx.array_equal(old, arrays["reference_logprobs"])


def test_gradient_checkpointing_changes_no_update():
    results = []
    for recompute in (False, True):
        grpo = learner(config(gradient_checkpointing=recompute))
        results.append((grpo.update(groups_of(grpo.policy)), weights(grpo)))
    assert results[0][0]["grad_norm"] == pytest.approx(results[1][0]["grad_norm"], rel=1e-6)
    # A step of Adam is 1e-3 for any gradient: one near 0 shows its rounding.
    for name, array in results[0][1].items():
        np.testing.assert_allclose(array, results[1][1][name], atol=1e-5)


def test_a_learner_made_anew_from_its_state_goes_on_bit_for_bit():
    straight = learner(config())
    groups = groups_of(straight.policy)
    straight.update(groups)
    resumed = learner(config())
    resumed.policy.load_trainable(straight.policy.trainable())
    resumed.training.load_state(straight.training.state())
    resumed.version = straight.version
    metrics = [grpo.update(groups) for grpo in (straight, resumed)]
    for key in ("loss", "grad_norm", "reward_mean", "entropy"):
        assert metrics[0][key].hex() == metrics[1][key].hex()
    assert_same_weights(weights(straight), weights(resumed))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_coeff": 0.1, "ratio": "recomputed", "top_entropy_share": 0.5, "entropy_coeff": 0.01},
        {"model": {"fine_tune_type": "lora", "lora_rank": 4, "lora_dropout": 0.5}},
        {"model": {"fine_tune_type": "dora", "lora_rank": 4}},
    ],
    ids=["plain", "every term", "lora", "dora"],
)
def test_warming_up_changes_no_update(settings):
    def updated(*, warm):
        grpo = learner(config(learning_rate=1e-2, batch_size=1, **settings))
        grpo.layout = replace(grpo.layout, fixed_row=64, longest=MAX_NEW)  # as on CUDA
        if warm:
            grpo.warm_up()
        return grpo.update(groups_of(grpo.policy, REWARDS[:1])), weights(grpo)

    (metrics, cold), (warm_metrics, warm) = updated(warm=False), updated(warm=True)
    assert_same_weights(warm, cold)
    assert warm_metrics["grad_norm"] == metrics["grad_norm"] > 0
