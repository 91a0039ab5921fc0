import inspect
import math
import random
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from reference import finite_differences, update_loss
from updates import RandomUpdate, inputs_of, loss_and_gradient, padded

from grpo_actors.config.objective import LOSSES, ObjectiveConfig
from grpo_actors.objective import losses
from grpo_actors.objective.advantages import ADVANTAGES
from grpo_actors.objective.aggregation import AGGREGATIONS
from grpo_actors.objective.batch_loss import objective_loss
from grpo_actors.objective.correction import CORRECTIONS
from grpo_actors.objective.kl import KL_ESTIMATORS
from grpo_actors.objective.micro_batches import Completion, Layout, pack
from grpo_actors.objective.statistics import (
    add_statistics,
    completion_gaps,
    summary,
    token_mismatches,
    token_statistics,
)

FULL = {"clip_eps": 0.2, "clip_eps_high": 0.28, "clip_delta": 1.6, "dual_clip": 1.7, "cispo_cap": 1.4}


def agrees_with_the_reference(update, objective):
    loss, gradient, _ = loss_and_gradient(update, objective)
    expected = update_loss(update, objective, update.logprobs)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)

    def at(logprobs):
        return update_loss(update, objective, logprobs, frozen=update.logprobs)

    by_differences = finite_differences(at, update.logprobs)
    assert np.concatenate(gradient) == pytest.approx(np.concatenate(by_differences), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_under_every_aggregation_equals_the_float64_reference(loss, aggregation):
    agrees_with_the_reference(RandomUpdate(1), ObjectiveConfig(loss=loss, aggregation=aggregation, **FULL))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_every_kl_term_equals_the_float64_reference(estimator):
    agrees_with_the_reference(RandomUpdate(2), ObjectiveConfig(kl_coeff=0.3, kl_estimator=estimator))


@pytest.mark.parametrize("loss", ["clip", "gspo", "sapo"])
@pytest.mark.parametrize("correction", ["none", *CORRECTIONS])
def test_every_correction_equals_the_float64_reference(correction, loss):
    bounds = {"correction_floor": 0.6, "correction_cap": 1.5}
    objective = ObjectiveConfig(loss=loss, ratio="recomputed", correction=correction, kl_coeff=0.1, **bounds)
    agrees_with_the_reference(RandomUpdate(3), objective)


@pytest.mark.parametrize("seed", range(40))
def test_any_combination_equals_the_float64_reference(seed):
    pick = random.Random(seed)
    loss, ratio = pick.choice(list(LOSSES)), pick.choice(["recorded", "recomputed"])
    allowed = [c for c in CORRECTIONS if loss != "cispo" or c.startswith("token")]
    objective = ObjectiveConfig(
        loss=loss,
        aggregation=pick.choice(list(AGGREGATIONS)),
        kl_coeff=pick.choice([0.0, 0.04, 1.0]),
        kl_estimator=pick.choice(list(KL_ESTIMATORS)),
        ratio=ratio,
        correction=pick.choice(["none", *allowed]) if ratio == "recomputed" else "none",
        correction_floor=pick.choice([0.0, 0.5]),
        correction_cap=pick.choice([1.2, 3.0]),
        mask_truncated=pick.random() < 0.5,
        entropy_coeff=pick.choice([0.0, 0.01]),
        top_entropy_share=pick.choice([1.0, 0.2]),
        **FULL,
    )
    agrees_with_the_reference(RandomUpdate(100 + seed), objective)


def test_the_entropy_bonus_pushes_each_entropy_up_by_its_weight():
    # loss = Σ weight (… − c H): d loss / d H = −c · weight, and dapo's weight is 1 / active tokens.
    update, objective = RandomUpdate(4), ObjectiveConfig(entropy_coeff=0.05)
    (m,) = update.packed(objective, rows=32).micro_batches
    extra = inputs_of(update, m, objective)
    logprobs, entropies = mx.array(padded(update, m, update.logprobs)), extra.pop("entropies")

    def by_entropy(h):
        return objective_loss(logprobs, m.arrays(), objective, entropies=h, **extra)[0]

    expected = np.where(m.mask, -0.05 / m.mask.sum(), 0.0)
    assert np.array(mx.grad(by_entropy)(entropies)) == pytest.approx(expected, rel=1e-6)


def test_a_log_ratio_beyond_20_is_clamped_so_that_nothing_overflows():
    update = RandomUpdate(5)
    update.logprobs[1][0] = update.behaviour[1][0] + 95.0  # e^95 overflows float32
    for loss in LOSSES:
        value, gradient, _ = loss_and_gradient(update, ObjectiveConfig(loss=loss, kl_coeff=0.1))
        assert np.isfinite(value)
        assert np.isfinite(np.concatenate(gradient)).all()


@pytest.mark.parametrize("junk", [np.inf, -np.inf, np.nan])
def test_the_content_of_padding_reaches_neither_loss_nor_gradient(junk):
    update = RandomUpdate(6)
    objective = ObjectiveConfig(
        ratio="recomputed", correction="token_truncate", kl_coeff=0.1, entropy_coeff=0.1
    )
    clean, _, _ = loss_and_gradient(update, objective, rows=32)
    (m,) = update.packed(objective, rows=32).micro_batches
    arrays = {k: np.array(v) for k, v in m.arrays().items()}
    arrays["behaviour_logprobs"][~m.mask] = junk
    batch = {k: mx.array(v) for k, v in arrays.items()}
    names = {"old_logprobs": "old", "reference_logprobs": "reference", "entropies": "entropies"}
    extra = {k: mx.array(padded(update, m, getattr(update, v), fill=junk)) for k, v in names.items()}

    def part(logprobs):
        return objective_loss(logprobs, batch, objective, **extra)

    (loss, statistics), gradient = mx.value_and_grad(part)(
        mx.array(padded(update, m, update.logprobs, fill=junk))
    )
    assert loss.item() == pytest.approx(clean, rel=1e-6)
    assert np.isfinite(np.array(gradient)).all()
    assert np.isfinite(np.array(statistics)).all()


@pytest.mark.parametrize(("name", "value"), [("entropies", math.inf), ("reference_logprobs", math.nan)])
def test_a_term_with_coefficient_0_is_not_in_the_loss_whatever_its_value(name, value):
    update, objective = RandomUpdate(4), ObjectiveConfig(entropy_coeff=0.0, kl_coeff=0.0)
    (m,) = update.packed(objective, rows=32).micro_batches
    logprobs = mx.array(padded(update, m, update.logprobs))
    without, with_it = (
        objective_loss(logprobs, m.arrays(), objective, **given)[0].item()
        for given in ({}, {name: mx.full(logprobs.shape, value)})
    )
    assert with_it == without


def test_only_the_policy_and_its_entropy_have_a_gradient():
    update = RandomUpdate(10)
    objective = ObjectiveConfig(
        ratio="recomputed", correction="token_truncate", kl_coeff=0.1, entropy_coeff=0.1
    )
    m = update.packed(objective).micro_batches[0]
    batch, extra = m.arrays(), inputs_of(update, m, objective)

    def part(logprobs, behaviour, old, reference):
        arrays = {**extra, "old_logprobs": old, "reference_logprobs": reference}
        return objective_loss(logprobs, {**batch, "behaviour_logprobs": behaviour}, objective, **arrays)[0]

    given = (batch["behaviour_logprobs"], extra["old_logprobs"], extra["reference_logprobs"])
    logprobs = mx.array(padded(update, m, update.logprobs))
    by_policy, *by_others = mx.grad(part, argnums=(0, 1, 2, 3))(logprobs, *given)
    assert np.array(by_policy).any()
    assert not any(np.array(g).any() for g in by_others)
    recorded = ObjectiveConfig()
    by_behaviour = mx.grad(
        lambda b: objective_loss(logprobs, {**batch, "behaviour_logprobs": b}, recorded)[0]
    )(given[0])
    assert not np.array(by_behaviour).any()


def test_log_probs_of_half_precision_are_reduced_in_float32():
    update, objective = RandomUpdate(7), ObjectiveConfig()
    m = update.packed(objective).micro_batches[0]
    logprobs = mx.array(padded(update, m, update.logprobs)).astype(mx.bfloat16)
    loss, statistics = objective_loss(logprobs, m.arrays(), objective)
    assert loss.dtype == mx.float32
    assert statistics.dtype == mx.float32


def test_statistics_count_what_the_loss_did():
    update, objective = (
        RandomUpdate(8),
        ObjectiveConfig(ratio="recomputed", correction="token_mask", correction_cap=1.3),
    )
    _, _, total = loss_and_gradient(update, objective, rows=2)
    got = summary(total)
    active = [
        (i, t) for i in range(update.size) if update.trains(i, False) for t in range(len(update.logprobs[i]))
    ]
    ratios = [np.exp(update.logprobs[i][t] - update.old[i][t]) for i, t in active]
    gaps = np.array([update.old[i][t] - update.behaviour[i][t] for i, t in active])
    signs = [update.advantages[i] for i, _ in active]
    xs = np.array([update.reference[i][t] - update.logprobs[i][t] for i, t in active])
    assert got["tokens"] == len(active)
    assert got["clip_low_share"] == pytest.approx(
        np.mean([r < 0.8 and a < 0 for r, a in zip(ratios, signs, strict=True)])
    )
    assert got["clip_high_share"] == pytest.approx(
        np.mean([r > 1.2 and a > 0 for r, a in zip(ratios, signs, strict=True)])
    )
    assert got["ratio_mean"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert got["ratio_max"] == pytest.approx(np.max(ratios), rel=1e-5)
    assert got["logprob_gap_mean"] == pytest.approx(np.abs(gaps).mean(), rel=1e-5)
    assert got["logprob_gap_max"] == pytest.approx(np.abs(gaps).max(), rel=1e-5)
    assert got["mismatch_kl"] == pytest.approx(np.mean(np.exp(gaps) - gaps - 1), rel=1e-4)
    assert got["kl"] == pytest.approx(np.mean(np.exp(xs) - xs - 1), rel=1e-4)
    assert got["correction_share"] == pytest.approx(np.mean(np.exp(gaps) > 1.3))
    assert got["entropy"] == pytest.approx(np.mean([update.entropies[i][t] for i, t in active]), rel=1e-5)
    nothing = summary(None)
    assert nothing.keys() == got.keys()
    assert {name: value for name, value in nothing.items() if value is not None} == {
        "loss": 0.0,
        "tokens": 0.0,
    }


@pytest.mark.parametrize(
    ("advantage", "low", "high", "second"),
    [(-1.0, 1 / 6, 0.0, 1 / 6), (0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 3 / 6, 0.0)],
)
def test_a_token_counts_as_clipped_only_beyond_a_bound_and_if_its_advantage_is_clipped_there(
    advantage, low, high, second
):
    # One ratio of six below 0.8, three above 1.2, one of them above 3. Three are exactly at a bound.
    ratios = mx.array([[0.5, 0.8, 1.2, 2.0, 3.0, 4.0]])
    got = summary(
        token_statistics(
            loss=mx.array(0.0),
            mask=mx.ones(ratios.shape, dtype=mx.bool_),
            ratio=ratios,
            bounds=(0.8, 1.2),
            second_bound=3.0,
            advantages=mx.array([advantage]),
            kl=None,
            log_mismatch=mx.zeros(ratios.shape),
            cut=None,
            entropies=None,
        )
    )
    shares = [got[f"clip_{which}_share"] for which in ("low", "high", "delta")]
    assert shares == pytest.approx([low, high, second])


def test_maxima_and_the_mismatch_of_each_token_are_those_of_active_tokens():
    statistics = token_statistics(
        loss=mx.array(0.0),
        mask=mx.array([[True, True, False], [True, False, False]]),
        ratio=mx.array([[0.5, 0.25, 9.0], [0.125, 9.0, 9.0]]),
        bounds=(0.8, 1.2),
        second_bound=None,
        advantages=mx.zeros(2),
        kl=None,
        log_mismatch=mx.array([[-0.5, 0.25, 7.0], [0.125, 7.0, 7.0]]),
        cut=None,
        entropies=None,
        keeps_tokens=True,
    )
    got = summary(statistics)
    assert (got["ratio_max"], got["logprob_gap_max"]) == (0.5, 0.5)
    assert token_mismatches(statistics, (2, 3)).tolist() == [[-0.5, 0.25, 0.0], [0.125, 0.0, 0.0]]


@pytest.mark.parametrize("packing", [{"rows": 1}, {"rows": 3}, {"fixed_row": 32}])
def test_the_gap_of_each_completion_is_reported_beside_the_totals(packing):
    update, objective = RandomUpdate(8), ObjectiveConfig(ratio="recomputed")
    packed = update.packed(objective, **packing)
    found = {}
    for m, numbers in zip(packed.micro_batches, packed.numbers, strict=True):
        inputs = inputs_of(update, m, objective)
        logprobs = mx.array(padded(update, m, update.logprobs))
        _, statistics = objective_loss(logprobs, m.arrays(), objective, **inputs)
        gaps = completion_gaps(statistics)
        assert len(gaps) == len(m.mask)
        found |= dict(zip(numbers, gaps, strict=False))
        assert not any(gaps[len(numbers) :])
    expected = {
        i: np.abs(np.subtract(update.old[i], update.behaviour[i])).sum()
        for i in range(update.size)
        if update.trains(i, False)
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("loss", "bound"), [("two_sided", "clip_delta"), ("dual_clip", "dual_clip")])
def test_the_second_bound_counts_the_tokens_whose_gradient_it_removed(loss, bound, rows):
    ratios = [[0.5, 3.0, 5.0, 9.0], [9.0, 9.0, 1.0], [3.9, 4.1]]
    advantages = [-1.0, 1.0, -2.0]
    update = pack(
        [Completion([1], [0] * len(r), [0.0] * len(r), A) for r, A in zip(ratios, advantages, strict=True)],
        Layout(10**6, rows),
        aggregation="dapo",
        max_new_tokens=4,
    )
    objective, total, still = ObjectiveConfig(loss=loss, **{bound: 4.0}), None, 0
    for m in update.micro_batches:
        # With log-probs of 0 under the sampler, log π is the log-ratio.
        logprobs = np.zeros(m.mask.shape, np.float32)
        for row in np.flatnonzero(m.mask.any(axis=1)):
            of_row = ratios[advantages.index(m.advantages[row])]
            logprobs[row, : len(of_row)] = np.log(of_row)

        batch = m.arrays()
        (_, sums), gradient = mx.value_and_grad(objective_loss)(mx.array(logprobs), batch, objective)
        total = add_statistics(total, sums)
        still += int((m.mask & (np.array(gradient) == 0)).sum())
    got = summary(total)
    # A = −1: 5 and 9 are beyond 4; A = −2: 4.1 is. With A = 1 only the first clip acts. 9 tokens in all.
    assert got["clip_delta_share"] == pytest.approx(3 / 9)
    # The first clip: 0.5 < 0.8 with A = −1; twice 9 > 1.2 with A = 1. No token counts twice.
    assert got["clip_share"] == pytest.approx(3 / 9)
    assert still == 6


def names(setting):
    """The names that section [objective] allows."""
    return set(get_args(ObjectiveConfig.model_fields[setting].annotation))


def test_every_row_of_a_table_is_a_name_in_the_configuration_and_the_other_way_round():
    assert names("advantage") == set(ADVANTAGES)
    assert names("loss") == set(LOSSES)
    assert names("aggregation") == set(AGGREGATIONS)
    assert names("kl_estimator") == set(KL_ESTIMATORS)
    assert names("correction") == {"none", *CORRECTIONS}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_reads_the_numbers_that_the_configuration_says_it_reads(loss):
    keywords = inspect.signature(getattr(losses, LOSSES[loss].function)).parameters.values()
    reads = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY}
    assert reads - {"logprobs"} == LOSSES[loss].reads


def test_a_missing_or_misshapen_array_is_named():
    update, objective = RandomUpdate(9), ObjectiveConfig(kl_coeff=0.1)
    m = update.packed(objective).micro_batches[0]
    logprobs = mx.array(padded(update, m, update.logprobs))
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        objective_loss(logprobs, m.arrays(), objective)
    with pytest.raises(ValueError, match=r"reference_logprobs must be \[N, C\]"):
        objective_loss(logprobs, m.arrays(), objective, reference_logprobs=logprobs[:, :1])
    with pytest.raises(ValueError, match="entropy_mask goes with top_entropy_share"):
        objective_loss(logprobs, m.arrays(), ObjectiveConfig(), entropy_mask=logprobs > 0)
    with pytest.raises(ValueError, match=r"advantages \[N\]"):
        objective_loss(logprobs, {**m.arrays(), "advantages": mx.zeros((99,))}, ObjectiveConfig())
