"""Two processes hold the same base model only if its architecture, numbers, names, shapes and vocabulary are the same."""

import mlx.core as mx
import pytest
from mlx import nn

from grpo_actors.policy.identity import excerpts_of, identify

VOCABULARY = {"a": 0, "b": 1, "c": 2}


class Layer(nn.Module):
    def __init__(self, **arrays):
        super().__init__()
        for name, array in arrays.items():
            setattr(self, name, array)


def identity(architecture="llama", vocabulary=VOCABULARY, **arrays):
    arrays = arrays or {"weight": mx.arange(6.0).reshape(2, 3), "bias": mx.array([1, 2, 3])}
    return identify("model", architecture, excerpts_of(Layer(**arrays)), vocabulary)


def test_an_identity_counts_all_parameters_and_is_the_same_in_every_process():
    assert identity().parameters == 2 * 3 + 3
    assert identity().mismatch(identity(vocabulary=dict(reversed(VOCABULARY.items())))) is None
    half = identity(weight=mx.arange(6.0).reshape(2, 3).astype(mx.bfloat16), bias=mx.array([1, 2, 3]))
    assert identity().mismatch(half) is None, "these numbers are the same in half precision"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"architecture": "qwen2"}, "architecture is llama here, qwen2 there"),
        ({"weight": mx.zeros((2, 3))}, "parameters is 9 here, 6 there"),
        ({"vocabulary": {"a": 1, "b": 0, "c": 2}}, "tokenizer"),
        ({"vocabulary": {"a": 0, "b": 1, "d": 2}}, "tokenizer"),
        ({"vocabulary": {"a": 0, "b": 1, "c": 3}}, "tokenizer"),
        ({"weight": mx.arange(6.0).reshape(2, 3), "bias": mx.array([1, 2, 4])}, "weights"),
        ({"weight": mx.arange(6.0).reshape(3, 2), "bias": mx.array([1, 2, 3])}, "weights"),
        ({"weight": mx.arange(6.0).reshape(2, 3), "scale": mx.array([1, 2, 3])}, "weights"),
    ],
)
def test_a_difference_is_named_by_its_part(changes, part):
    assert identity().mismatch(identity(**changes)).startswith(part)
