"""The gated delta rule in chunks: mlx-lm's results and gradients, token by token, in a fraction of the memory."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta, qwen3_5, qwen3_next

from grpo_actors.config import LearnerConfig
from grpo_actors.policy.gated_delta import CHUNK, by_chunks, delta_by_chunks, delta_layers, update
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.recomputation import recomputed_blocks
from grpo_actors.policy.training import Training

NAMES = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "state")


def inputs(length, *, rows=2, key_heads=2, value_heads=4, key=16, value=8, strongest=16.0):
    """Return random arguments of mlx-lm's function; `strongest`: the largest decay rate, as at the start of training."""
    mx.random.seed(0)
    q, k = (mx.random.normal((rows, length, key_heads, key)) for _ in range(2))
    q, k = gated_delta.normalize_qk(q, k, inv_scale=key**-0.5, eps=1e-6)
    return {
        "q": q,
        "k": k,
        "v": mx.random.normal((rows, length, value_heads, value)),
        "a": mx.random.normal((rows, length, value_heads)),
        "b": mx.random.normal((rows, length, value_heads)),
        "A_log": mx.log(mx.linspace(0.1, strongest, value_heads)),
        "dt_bias": mx.ones(value_heads),
        "state": mx.random.normal((rows, value_heads, value, key)),
    }


def results(function, given, mask=None):
    """Return outputs, final state, and the gradient of a random sum of both by every argument."""
    outputs, state = function(*given.values(), mask)
    if mask is not None:
        outputs = outputs * mask[..., None, None]
    mx.random.seed(1)
    weights = mx.random.normal(outputs.shape), mx.random.normal(state.shape)

    def loss(*arrays):
        y, last = function(*arrays, mask)
        y = y if mask is None else y * mask[..., None, None]
        return (y * weights[0]).sum() + (last * weights[1]).sum()

    gradients = mx.grad(loss, argnums=list(range(len(given))))(*given.values())
    return {"y": outputs, "last": state, **dict(zip(NAMES, gradients, strict=True))}


def assert_same(one, other, tolerance=2e-6):
    for name, array in one.items():
        scale = max(1e-6, float(mx.abs(array).max()))
        np.testing.assert_allclose(other[name] / scale, array / scale, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("length", [2, CHUNK, CHUNK + 1, 2 * CHUNK + 30])
def test_outputs_states_and_gradients_are_those_of_the_loop_over_tokens(length):
    given = inputs(length)
    assert_same(results(gated_delta.gated_delta_update, given), results(update, given))


def test_masked_tokens_change_nothing():
    given = inputs(CHUNK + 20)
    mask = mx.arange(CHUNK + 20)[None] < mx.array([[CHUNK + 20], [30]])
    assert_same(results(gated_delta.gated_delta_update, given, mask), results(update, given, mask))


def test_a_decay_that_is_0_in_float32_forgets_everything_and_keeps_gradients_finite():
    given = inputs(CHUNK, strongest=500.0)  # exp(-500 · softplus(1 ± 1)): far below the smallest float32
    of_loop, of_chunks = results(gated_delta.gated_delta_update, given), results(update, given)
    assert_same({name: of_loop[name] for name in ("y", "last", "v", "b")}, of_chunks)
    assert all(np.isfinite(np.array(array)).all() for array in of_chunks.values())


def test_equal_keys_without_decay_are_solved_without_cancellation():
    # Every token replaces what the key remembers: y is the newest value. The powers of A reach 63 over 31 = 9e17.
    key = mx.zeros((1, 2 * CHUNK, 1, 4))
    key[..., 0] = 1.0
    values, one = mx.random.normal((1, 2 * CHUNK, 1, 4)), mx.ones((1, 2 * CHUNK, 1))
    outputs, _ = by_chunks(key, key, values, mx.zeros_like(one), one, mx.zeros((1, 1, 4, 4)))
    np.testing.assert_allclose(outputs, values, atol=1e-5)


def test_mlxs_kernel_means_the_same_by_its_arguments():
    given = inputs(50)
    decay = gated_delta.compute_g(given["A_log"], given["a"], given["dt_bias"])
    arrays = [given[name] for name in ("q", "k", "v")]
    own = mx.fast.gated_delta_update(*arrays, decay, mx.sigmoid(given["b"]), given["state"])
    outputs, state = update(*given.values())
    assert_same({"y": outputs, "last": state}, {"y": own[0], "last": own[1]})


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"state": None}, {}),
        ({}, {"allow_neg_eigval": True}),
        ({}, {"allow_neg_eigval": False}),
        ({}, {"lower_bound": -2.0}),
        ({"a": mx.random.normal((2, 70, 4, 16), key=mx.random.key(3)), "dt_bias": mx.ones((4, 16))}, {}),
    ],
    ids=["no state", "negative eigenvalues", "none", "bounded decay", "a decay for each element of a key"],
)
def test_every_form_of_the_rule_gives_mlx_lms_results(changes, settings):
    given = inputs(70) | changes
    if given["a"].ndim > 3:
        given["A_log"] = given["A_log"][:, None]
    arrays = [given[name] for name in NAMES]
    one, other = (function(*arrays, **settings) for function in (gated_delta.gated_delta_update, update))
    assert_same(
        dict(zip(("y", "last"), one, strict=True)), dict(zip(("y", "last"), other, strict=True)), 1e-5
    )


def test_half_precision_is_computed_in_float32_and_returned_as_it_came():
    given = inputs(CHUNK + 3)
    half = {name: array.astype(mx.bfloat16) if name in "qkvab" else array for name, array in given.items()}
    exact = {name: array.astype(mx.float32) for name, array in half.items()}
    (outputs, state), (expected, last) = update(*half.values()), update(*exact.values())
    assert (outputs.dtype, state.dtype) == (mx.bfloat16, mx.float32)
    np.testing.assert_allclose(outputs.astype(mx.float32), expected, atol=2**-6)
    np.testing.assert_allclose(state, last, atol=1e-2)


def gradients(model):
    def likelihood(model):
        tokens = mx.array([[*range(1, 50), *range(1, 50)]])
        logprobs, _ = completion_logprobs(model, tokens, mx.array([30]), mx.array([list(range(1, 41))]), 1.0)
        return logprobs.sum()

    model.train()
    value, found = nn.value_and_grad(model, likelihood)(model)
    return {"loss": value, **dict(tree_flatten(found))}


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_a_model_has_the_same_gradient_in_chunks(family):
    model = random_policy(family).model
    by_tokens = gradients(model)
    with delta_by_chunks(model):
        assert_same(by_tokens, gradients(model), tolerance=2e-4)
        with recomputed_blocks(model):
            assert_same(by_tokens, gradients(model), tolerance=2e-4)
    assert qwen3_next.gated_delta_update is gated_delta.gated_delta_update


def test_the_layers_of_the_rule_are_found_among_a_models_modules():
    [kind] = delta_layers(random_policy("qwen3_5").model)
    assert kind.__name__ == "GatedDeltaNet"
    assert delta_layers(random_policy("llama").model) == set()


# Not on a GPU: how far MLX computes ahead decides the peak there.
def test_training_keeps_of_such_a_layer_nothing_but_its_input():
    mx.random.seed(0)
    given = qwen3_5.TextModelArgs(
        hidden_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    )

    def peak(layers):
        model = nn.Sequential(*(qwen3_5.GatedDeltaNet(given) for _ in range(layers)))
        mx.eval(model.parameters())
        training = Training(model, LearnerConfig(), lambda model, given: 2 * (model(given["x"]).sum(),))
        with delta_by_chunks(model):
            arrays = {"x": mx.random.normal((4, 2 * CHUNK, 16))}
            training.accumulate(arrays)
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            training.accumulate(arrays)
        # Each further layer has another gradient, besides what is meant.
        return mx.get_peak_memory() - before - sum(x.nbytes for _, x in tree_flatten(model.parameters()))

    tokens, projected = 4 * 2 * CHUNK, 3 * 4 * 32  # queries, keys and values of all heads
    assert peak(6) - peak(2) < 4 * tokens * projected * 4, "one array of what a layer projects is more"


def test_no_state_is_kept_for_every_token():
    length, size = 16 * CHUNK, 64
    given = inputs(length, rows=1, key_heads=1, value_heads=1, key=size, value=size)
    mx.eval(given)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(lambda *arrays: update(*arrays)[0].sum(), argnums=[0, 1, 2])(*given.values()))
    # The loop keeps two arrays [Dv, Dk] a token in its backward pass.
    assert mx.get_peak_memory() - before < length * size * size * 4
