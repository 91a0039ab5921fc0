"""Convolutions of each channel by itself, by shifts: MLX's results and gradients."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx import nn

from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.short_convolution import by_shifts, convolutions_by_shifts

pytestmark = pytest.mark.skipif(mx.metal.is_available(), reason="Metal's own kernel stays")


@pytest.mark.parametrize(("taps", "dtype"), [(1, mx.float32), (4, mx.float32), (4, mx.bfloat16)])
def test_values_and_gradients_are_those_of_mlxs_convolution(taps, dtype):
    keys = mx.random.split(mx.random.key(0), 3)
    x, weight, of_y = (
        mx.random.normal(shape, key=key).astype(dtype)
        for shape, key in zip([(2, 9 + taps, 6), (6, taps), (2, 10, 6)], keys, strict=True)
    )

    def results(convolve):
        value = convolve(x, weight)
        gradients = mx.grad(lambda *given: (convolve(*given) * of_y).sum(), argnums=(0, 1))(x, weight)
        return [np.array(array.astype(mx.float32)) for array in (value, *gradients)]

    ours = results(by_shifts)
    mlxs = results(lambda x, weight: mx.conv1d(x, weight[..., None], groups=6))
    # bfloat16 has eight bits; sums of ten products and more are up to 10.
    tolerance = 1e-5 if dtype == mx.float32 else 10 * 2**-7
    for own, theirs in zip(ours, mlxs, strict=True):
        np.testing.assert_allclose(own, theirs, atol=tolerance)


@pytest.mark.parametrize("family", ["qwen3_5", "mamba", "falcon_h1"])  # the second has a bias
def test_a_model_gives_the_same_log_probs(family):
    model = random_policy(family).model
    tokens = mx.array([[*range(1, 30)]])

    def logprobs():
        found, _ = completion_logprobs(model, tokens, mx.array([10]), mx.array([list(range(1, 20))]), 1.0)
        return np.array(found)

    plain, original = logprobs(), nn.Conv1d.__call__
    with convolutions_by_shifts(model):
        assert nn.Conv1d.__call__ is not original
        np.testing.assert_allclose(logprobs(), plain, atol=1e-4)
        other = nn.Conv1d(4, 6, 3)  # not of the model
        assert other(mx.ones((1, 5, 4))).shape == (1, 3, 6)
    assert nn.Conv1d.__call__ is original


def test_a_model_without_such_layers_is_left_alone():
    original = nn.Conv1d.__call__
    with convolutions_by_shifts(random_policy("qwen2").model):
        assert nn.Conv1d.__call__ is original


def test_convolutions_of_another_kind_are_left_to_mlx():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            alone = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4}
            self.layers = [
                nn.Conv1d(**alone | other)
                for other in (
                    {"stride": 2},
                    {"padding": 1},
                    {"dilation": 2},
                    {"groups": 1},
                    {"groups": 2},
                    {"out_channels": 8},  # two for each channel
                    {"kernel_size": 9},
                    {},
                )
            ]

    model, x = Convolutions(), mx.random.normal((2, 12, 4), key=mx.random.key(0))
    plain = [layer(x) for layer in model.layers]
    with convolutions_by_shifts(model):
        for layer, expected in zip(model.layers, plain, strict=True):
            np.testing.assert_allclose(layer(x), expected, atol=1e-5)
