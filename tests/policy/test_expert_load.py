"""The balance of experts: from choices by hand, and of a model during an update."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx import nn

from grpo_actors.policy.expert_load import Choice, has_experts, largest_load, watched_experts
from grpo_actors.policy.recomputation import recomputed_blocks

#: Two rows of three tokens; the third and the last are padding. Tokens 0, 1, 3 and 4 predict, 1 of them does not train.
BATCH = {
    "inputs_at": mx.array([0, 1, 3, 4]),
    "targets": mx.array([7, 7, 7, 7]),
    "target_at": mx.array([[0, 1], [2, 3]]),
    "mask": mx.array([[True, False], [True, True]]),
}


def test_the_largest_load_counts_the_tokens_that_train():
    chosen = mx.array([[[0, 1], [2, 3], [3, 3]], [[0, 2], [0, 1], [3, 3]]])
    # Tokens 0, 3 and 4 choose 0 1, 0 2 and 0 1: expert 0 has 3 of 6 choices, the mean of four experts is 6 / 4.
    assert largest_load([Choice(4, chosen)], BATCH).item() == pytest.approx(3 / (6 / 4))
    even = mx.array([[[0, 1], [0, 0], [0, 0]], [[2, 3], [4, 5], [0, 0]]])
    assert largest_load([Choice(6, even)], BATCH).item() == 1.0
    assert largest_load([Choice(4, chosen), Choice(6, even)], BATCH).item() == pytest.approx(1.5)
    nobody = BATCH | {"mask": mx.zeros((2, 2), mx.bool_)}
    assert largest_load([Choice(4, chosen)], nobody).item() == 0.0
    alone = BATCH | {"mask": mx.array([[True, False], [False, False]])}
    assert largest_load([Choice(4, chosen[..., :1])], alone).item() == 4.0


def test_the_choices_of_every_layer_are_watched_also_where_blocks_are_computed_again():
    model = random_policy("qwen3_moe").model
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert has_experts(model)
    assert not has_experts(random_policy("qwen2").model)

    def loss(model):
        with watched_experts() as choices:
            logits = model(tokens)
        return logits.square().sum(), mx.stack([choice.chosen for choice in choices])

    (_, chosen), _ = nn.value_and_grad(model, loss)(model)
    with recomputed_blocks(model):
        (_, again), _ = nn.value_and_grad(model, loss)(model)
    assert chosen.shape == (2, 1, 5, 2)  # two layers, two of four experts for each token
    np.testing.assert_array_equal(chosen, again)
    assert 0 <= mx.min(chosen).item() <= mx.max(chosen).item() < 4
