"""The gradient of one update of the embedded model does not depend on order, split, ranks or compilation."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hand_made import MAX_NEW, REWARDS, changed, config, groups_of, learner
from mlx.utils import tree_flatten

from grpo_actors.learner.grpo import _alone, _completions, layout_of
from grpo_actors.learner.ranks import Ranks
from grpo_actors.objective.advantages import compute_advantages
from grpo_actors.objective.micro_batches import pack
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training

GROUPS = 8
NAMES = ("Tom", "Ann", "Eve", "Bob", "Ben", "Kim", "Lea", "Max")
QUESTIONS = [f"{name} has 21 apples and buys 3 bags of {n}. Now?" for n, name in enumerate(NAMES, 12)]


def settings(aggregation="dapo", micro_batches=1):
    return config(
        aggregation=aggregation,
        kl_coeff=0.1,
        batch_size=GROUPS // micro_batches,
        gradient_accumulation_steps=micro_batches,
        adam_beta1=0.0,  # the first moment is then the gradient itself
    )


@cache
def eight_groups():
    return tuple(groups_of(load_policy(settings().model, seed=0), REWARDS * 2, questions=QUESTIONS))


def gradient_of(grpo):
    """Return the gradient of the last step."""
    state = tree_flatten(grpo.training.optimizer.state)
    return np.concatenate([np.array(m).ravel() for name, m in state if name.endswith(".m")])


def updated(groups, *, compiled=None, packed=True, **cut):
    """Return a learner that has done one update on the groups."""
    chosen = settings(**cut)
    grpo = learner(chosen)
    assert grpo.layout.shared
    grpo.layout = replace(grpo.layout, shared=packed)
    if compiled is not None:
        grpo.training = Training(grpo.policy.model, chosen.learner, grpo._loss, compiled=compiled)
    grpo.update(groups)
    return grpo


@cache
def gradient(aggregation="dapo", micro_batches=1):
    """Return the gradient of all groups in their order."""
    return gradient_of(updated(eight_groups(), aggregation=aggregation, micro_batches=micro_batches))


def assert_same_gradient(a, b):
    # Arrays of another width are added up in another order, which rounds by 4e-6.
    assert np.linalg.norm(b) > 1e-2
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.gpu
@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_it_does_not_depend_on_the_split_into_micro_batches(aggregation):
    for parts in (2, 8):
        assert_same_gradient(gradient(aggregation, parts), gradient(aggregation))


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_it_does_not_depend_on_the_order_of_the_groups(micro_batches):
    groups = eight_groups()
    shuffled = [groups[i] for i in np.random.default_rng(0).permutation(GROUPS)]
    assert [g.lease for g in shuffled] != [g.lease for g in groups]
    otherwise = updated(shuffled, micro_batches=micro_batches)
    assert_same_gradient(gradient_of(otherwise), gradient(micro_batches=micro_batches))


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_two_ranks_that_share_the_micro_batches_of_one_update_add_up_to_the_whole(aggregation):
    # Advantages and denominators are those of the whole update: it is packed together and then dealt out.
    chosen, groups = settings(aggregation, micro_batches=8), eight_groups()
    rewards = [np.array([[c.rewards["hand"]] for c in group.completions]) for group in groups]
    packed = pack(
        list(_completions(groups, compute_advantages("group", rewards, [1.0]))),
        layout_of(chosen, packed=True),
        aggregation=aggregation,
        max_new_tokens=MAX_NEW,
    )
    assert len(packed.micro_batches) == 8
    ranks = [learner(chosen), learner(chosen)]
    for rank, grpo in enumerate(ranks):
        for arrays in grpo._inputs(_alone(packed.micro_batches[rank::2]), Ranks()):
            with grpo._training_mode():
                grpo.training.accumulate(arrays)
        grpo.training.step(1e-3)
    parts = [gradient_of(grpo) for grpo in ranks]
    assert all(np.linalg.norm(part) > 1e-2 for part in parts)
    assert_same_gradient(parts[0] + parts[1], gradient(aggregation))


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_it_does_not_depend_on_whether_completions_share_rows(micro_batches):
    groups = changed(eight_groups(), 1, 2, rewards={"hand": None})  # a group of three, and one of four
    shared, apart = (updated(groups, micro_batches=micro_batches, packed=which) for which in (True, False))
    assert_same_gradient(gradient_of(shared), gradient_of(apart))


@pytest.mark.gpu
def test_it_is_the_same_plain_and_compiled():
    plain, compiled = (updated(eight_groups(), compiled=which) for which in (False, True))
    assert_same_gradient(gradient_of(compiled), gradient_of(plain))
