import mlx.core as mx
import numpy as np
import pytest
from updates import RandomUpdate, loss_and_gradient

from grpo_actors.config.objective import LOSSES, Loss, ObjectiveConfig
from grpo_actors.objective import losses
from grpo_actors.objective.batch_loss import clip_bounds
from grpo_actors.objective.losses import (
    cispo_loss,
    clip_loss,
    dual_clip_loss,
    sapo_loss,
    two_sided_loss,
)

EPS = {"clip_eps": 0.2, "clip_eps_high": 0.28}


def of_ratios(function, A, *ratios, **numbers):
    return np.array(function(mx.log(mx.array([ratios])), mx.array([A]), **numbers))[0]


def test_clip_by_hand():
    # A = 2: −min(2 r, 2 clip(r)): r = .5 → −1; r = 1.1 → −2.2; r = 2 → −2 · 1.28.
    assert of_ratios(clip_loss, 2.0, 0.5, 1.1, 2.0, **EPS) == pytest.approx([-1.0, -2.2, -2.56])
    # A = −1: max(r, clip(r)): r = .5 → .8; r = 1.1 → 1.1; r = 2 → 2.
    assert of_ratios(clip_loss, -1.0, 0.5, 1.1, 2.0, **EPS) == pytest.approx([0.8, 1.1, 2.0])


def test_two_sided_and_dual_clip_bound_what_clip_leaves_open_for_negative_advantages():
    assert of_ratios(two_sided_loss, -1.0, 0.5, 3.0, 9.0, clip_delta=4.0, **EPS) == pytest.approx(
        [0.8, 3.0, 4.0]
    )
    assert of_ratios(two_sided_loss, 1.0, 0.5, 9.0, clip_delta=4.0, **EPS) == pytest.approx([-0.5, -1.28])
    assert of_ratios(dual_clip_loss, -2.0, 0.5, 2.0, 9.0, dual_clip=3.0, **EPS) == pytest.approx(
        [1.6, 4.0, 6.0]
    )


def test_two_sided_with_delta_c_is_dual_clip_with_c_and_without_a_bound_is_clip():
    log_ratio, A = (
        mx.random.normal((8, 16), key=mx.random.key(0)),
        mx.random.normal((8,), key=mx.random.key(1)),
    )
    two_sided = np.array(two_sided_loss(log_ratio, A, clip_delta=1.7, **EPS))
    assert two_sided == pytest.approx(np.array(dual_clip_loss(log_ratio, A, dual_clip=1.7, **EPS)))
    unbounded = np.array(two_sided_loss(log_ratio, A, clip_delta=1e9, **EPS))
    assert unbounded == pytest.approx(np.array(clip_loss(log_ratio, A, **EPS)))


def test_cispo_keeps_the_gradient_of_a_token_beyond_its_cap():
    logprobs, anchor = mx.array([[-1.0, -1.0]]), mx.array([[-1.1, -3.0]])

    def total(x):
        return cispo_loss(mx.stop_gradient(x) - anchor, mx.array([2.0]), logprobs=x, cispo_cap=3.0).sum()

    # −A · min(r, cap): r = e^0.1 and e^2 = 7.4 > 3.
    assert np.array(mx.grad(total)(logprobs))[0] == pytest.approx([-2 * np.exp(0.1), -6.0])


def test_sapo_by_hand_and_its_gate_is_widest_at_one():
    # −(4/τ) σ(τ (r − 1)) A at r = 1 is −(2/τ) A, with τ by the sign of A.
    numbers = {"sapo_tau_positive": 1.0, "sapo_tau_negative": 1.05}
    assert of_ratios(sapo_loss, 1.0, 1.0, **numbers) == pytest.approx([-2.0])
    assert of_ratios(sapo_loss, -1.0, 1.0, **numbers) == pytest.approx([2 / 1.05])

    def slope(r):
        return (
            mx.grad(lambda x: sapo_loss(x, mx.array([1.0]), **numbers).sum())(mx.log(mx.array([[r]]))).item()
            / r
        )

    assert slope(1.0) == pytest.approx(-1.0)
    assert slope(0.2) == pytest.approx(slope(1.8))
    assert abs(slope(1.8)) < 1.0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_where_the_policy_is_the_old_policy_every_loss_has_the_policy_gradient(loss, aggregation):
    update, objective = RandomUpdate(11), ObjectiveConfig(loss=loss, aggregation=aggregation)
    update.logprobs = update.behaviour
    _, gradient, _ = loss_and_gradient(update, objective)
    # d/dlog π of −Σ weight · A · log π is −weight · A at each token.
    expected = [[0.0] * len(row) for row in update.logprobs]
    for m in update.packed(objective).micro_batches:
        for row, i in update.rows(m):
            expected[i] = [-float(m.token_weights[row, 0]) * update.advantages[i]] * len(expected[i])
    assert np.concatenate(gradient) == pytest.approx(np.concatenate(expected), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("loss", ["clip", "two_sided", "dual_clip", "gspo", "gspo_token"])
def test_where_the_policy_is_the_old_policy_the_loss_is_minus_the_mean_advantage(loss):
    update, objective = RandomUpdate(12), ObjectiveConfig(loss=loss, aggregation="grpo")
    update.logprobs = update.behaviour
    active = [update.advantages[i] for i in range(update.size) if update.trains(i, False)]
    assert loss_and_gradient(update, objective)[0] == pytest.approx(-np.mean(active), rel=1e-5, abs=1e-6)


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-6, abs=1e-7)
    assert np.concatenate(one[1]) == pytest.approx(np.concatenate(other[1]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("loss", ["gspo", "gspo_token"])
def test_gspo_of_completions_of_one_token_is_the_token_loss(loss):
    update = RandomUpdate(13, equal_lengths=1)
    same(
        loss_and_gradient(update, ObjectiveConfig(loss=loss)),
        loss_and_gradient(update, ObjectiveConfig(loss="clip")),
    )


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_gspo_token_has_the_loss_and_the_gradient_of_gspo(aggregation):
    update = RandomUpdate(14)
    token = ObjectiveConfig(loss="gspo_token", aggregation=aggregation)
    same(
        loss_and_gradient(update, ObjectiveConfig(loss="gspo", aggregation=aggregation)),
        loss_and_gradient(update, token),
    )


@pytest.mark.parametrize(
    ("loss", "bounds", "second"),
    [
        *((loss, (0.8, 1.28), None) for loss in ("clip", "gspo", "gspo_token")),
        ("two_sided", (0.8, 1.28), 4.0),
        ("dual_clip", (0.8, 1.28), 3.0),
        ("cispo", (0.0, 5.0), None),
        ("sapo", (0.0, float("inf")), None),
    ],
)
def test_the_bounds_beyond_which_a_token_counts_as_clipped_are_those_of_its_loss(loss, bounds, second):
    objective = ObjectiveConfig(loss=loss, clip_delta=4.0, dual_clip=3.0, cispo_cap=5.0, **EPS)
    assert clip_bounds(objective) == (pytest.approx(bounds), second)


def reinforce_loss(log_ratio, advantages, *, logprobs, clip_eps_high):
    """−A log π, scaled by a number to show that the number is read."""
    return -clip_eps_high * advantages[:, None] * logprobs


def test_one_more_algorithm_is_one_function_and_one_row(monkeypatch):
    monkeypatch.setitem(LOSSES, "reinforce", Loss("reinforce_loss", frozenset({"clip_eps_high"})))
    monkeypatch.setattr(losses, "reinforce_loss", reinforce_loss, raising=False)
    update = RandomUpdate(15, equal_lengths=2)
    _, gradient, _ = loss_and_gradient(
        update, ObjectiveConfig(clip_eps=0.5, aggregation="dr_grpo").model_copy(update={"loss": "reinforce"})
    )
    weight = 1 / (update.size * update.max_new_tokens)
    expected = [[-0.5 * weight * a] * 2 for a in update.advantages]
    assert np.array(gradient) == pytest.approx(np.array(expected), rel=1e-5)


def test_misshapen_inputs_are_refused_and_not_broadcast():
    with pytest.raises(ValueError, match=r"log_ratio must be \[N, C\] and advantages \[N\]"):
        clip_loss(mx.zeros((4, 4)), mx.zeros((4, 4)), **EPS)
    with pytest.raises(ValueError, match=r"log_ratio must be"):
        clip_loss(mx.zeros((4,)), mx.zeros((4,)), **EPS)
