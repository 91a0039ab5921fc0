import mlx.core as mx
import numpy as np
import pytest
from updates import RandomUpdate, loss_and_gradient

from grpo_actors.config import ObjectiveConfig
from grpo_actors.objective.correction import CORRECTIONS, correction_weights

#: π_old / μ of two completions; the second has one token only.
RATIOS = [[0.5, 2.0, 4.0], [1.5, 9.0, 9.0]]
MASK = mx.array([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("name", "weights", "cut"),
    [
        ("token_truncate", [[0.5, 2.0, 3.0], [1.5]], [[0, 0, 1], [0]]),
        ("token_mask", [[0.0, 2.0, 0.0], [1.5]], [[1, 0, 1], [0]]),
        # The product is 0.5 · 2 · 4 = 4 and 1.5.
        ("sequence_truncate", [[3.0, 3.0, 3.0], [1.5]], [[1, 1, 1], [0]]),
        ("sequence_mask", [[0.0, 0.0, 0.0], [1.5]], [[1, 1, 1], [0]]),
    ],
)
def test_weights_by_hand(name, weights, cut):
    old = mx.log(mx.array(RATIOS))
    w, was_cut = correction_weights(name, old, mx.zeros_like(old), MASK, floor=0.6, cap=3.0)
    assert np.array(w)[0] == pytest.approx(weights[0])
    assert np.array(w)[1, :1] == pytest.approx(weights[1])
    assert np.array(was_cut).astype(int).tolist() == [cut[0], [*cut[1], 0, 0]]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_weight_that_is_one_of_the_bounds_is_within_them(name):
    equal = mx.zeros(MASK.shape)
    w, cut = correction_weights(name, equal, equal, MASK, floor=1.0, cap=1.0)
    assert np.array(w).tolist() == [[1.0] * 3] * 2
    assert not np.array(cut).any()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_sampler_that_is_the_learners_own_policy_needs_no_correction(name):
    update = RandomUpdate(21)
    update.old = update.behaviour
    plain, _, _ = loss_and_gradient(update, ObjectiveConfig(ratio="recomputed"))
    corrected, _, _ = loss_and_gradient(update, ObjectiveConfig(ratio="recomputed", correction=name))
    recorded, _, _ = loss_and_gradient(update, ObjectiveConfig(ratio="recorded"))
    assert corrected == plain == recorded


def test_a_wild_sampler_does_not_overflow_the_product_of_a_sequence():
    old, behaviour = mx.zeros((1, 64)), mx.full((1, 64), -5.0)
    w, cut = correction_weights(
        "sequence_truncate", old, behaviour, mx.ones((1, 64), mx.bool_), floor=0.0, cap=3.0
    )
    assert np.array(w).tolist() == [[3.0] * 64]
    assert np.array(cut).all()
