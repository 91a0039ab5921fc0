"""Recomputation gives the same gradient as keeping all activations."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from grpo_actors.config import ModelConfig
from grpo_actors.policy.architectures import ARCHITECTURES
from grpo_actors.policy.gated_delta import delta_layers
from grpo_actors.policy.logprobs import completion_logprobs, logprobs_by_parts, split_head
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.recomputation import recomputed_blocks, recomputed_gates, recomputed_layers
from grpo_actors.policy.recurrent_layers import for_whole_texts

TOKENS, TARGETS = mx.array([[1, 2, 3, 4, 5, 6]]), mx.array([[4, 5, 6]])


def likelihood(model):
    logprobs, _ = completion_logprobs(model, TOKENS, mx.array([2]), TARGETS, 1.0)
    return logprobs.sum()


def gradients(model):
    _, gradients = nn.value_and_grad(model, likelihood)(model)
    return {name: np.array(array) for name, array in tree_flatten(gradients)}


def assert_recomputing_changes_no_gradient(model, recomputing=recomputed_blocks):
    kept = gradients(model)
    with recomputing(model):
        recomputed = gradients(model)
    assert kept.keys() == recomputed.keys()
    assert any(np.abs(array).max() > 1e-3 for array in kept.values())
    for name, array in kept.items():
        scale = np.abs(array).max() or 1.0
        np.testing.assert_allclose(recomputed[name], array, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_recomputed_blocks_give_the_same_gradient(family):
    model = random_policy(family).model
    forward = type(model.layers[0]).__call__
    assert_recomputing_changes_no_gradient(model)
    assert type(model.layers[0]).__call__ is forward, "sampling runs the plain block again"


def head_of_its_own(policy):
    assert type(policy.model.lm_head) is nn.Linear


def head_tied(policy):
    policy.model.pop("lm_head")
    policy.model.args.tie_word_embeddings = True


def head_quantised(policy):
    policy.model.lm_head = policy.model.lm_head.to_quantized(group_size=32, bits=8)


def head_with_an_adapter(policy):
    policy.model.lm_head = LoRALinear.from_base(policy.model.lm_head, r=2)


@pytest.mark.parametrize(
    ("change", "entropies_train"),
    [
        *((head_tied, train) for train in (True, False)),
        *((change, True) for change in (head_of_its_own, head_quantised, head_with_an_adapter)),
    ],
)
def test_a_head_that_runs_by_parts_gives_the_same_values_and_gradient(change, entropies_train):
    policy = random_policy("qwen2")
    change(policy)
    model, temperature = policy.model, 0.7
    tokens, targets = mx.array([[1, 2, 3, 4, 5, 6, 7]]), mx.array([2, 3, 4, 5, 6, 7, 8])

    def whole(head, hidden):
        logits = head(hidden) / temperature
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropies = -(mx.exp(logprobs) * logprobs).sum(axis=-1)
        return mx.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], entropies

    def by_parts(head, hidden):  # of three, three and one
        return logprobs_by_parts(head, hidden, targets, temperature, entropies_train=entropies_train, rows=3)

    def results(compute):
        def value(model):
            body, head = split_head(model)
            logprobs, entropies = compute(head, body(tokens)[0])
            trained = logprobs.sum() + (0.1 * entropies.sum() if entropies_train else 0)
            return trained, (logprobs, entropies)

        (_, (logprobs, entropies)), gradients = nn.value_and_grad(model, value)(model)
        arrays = {name: np.array(array) for name, array in tree_flatten(gradients)}
        return arrays | {"logprobs": np.array(logprobs), "entropies": np.array(entropies)}

    expected, got = results(whole), results(by_parts)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    assert np.abs(expected["model.layers.0.mlp.down_proj.weight"]).max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "family", [*(name for name, row in ARCHITECTURES.items() if row.gated_mlp), "smollm3"]
)
def test_recomputed_gates_give_the_same_gradient(family):
    model = random_policy(family).model
    [mlp] = {type(layer.mlp) for layer in model.layers}
    forward = mlp.__call__
    with recomputed_gates(model):
        assert mlp.__call__ is not forward
    assert mlp.__call__ is forward
    assert_recomputing_changes_no_gradient(model, recomputed_gates)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear"])
def test_recomputed_layers_of_the_gated_delta_rule_give_the_same_gradient(family):
    model = random_policy(family).model
    assert delta_layers(model)
    with for_whole_texts(model):
        assert_recomputing_changes_no_gradient(model, lambda model: recomputed_layers(delta_layers(model)))


def test_a_model_with_a_different_gate_is_left_unchanged():
    model = random_policy("gemma3_text").model
    forward = type(model.layers[0].mlp).__call__
    with recomputed_gates(model):
        assert type(model.layers[0].mlp).__call__ is forward


# Not on a GPU: how far MLX computes ahead decides the peak there.
def test_recomputed_gates_use_less_memory():
    sizes = {"hidden_size": 64, "intermediate_size": 2048, "head_dim": 16, "num_hidden_layers": 8}
    model = random_policy("llama", **sizes).model
    tokens = mx.zeros((8, 64), mx.int32)
    plain = nn.value_and_grad(model, lambda model: model(tokens).sum())

    def peak():
        compute = mx.compile(lambda: plain(model), inputs=[model.state], outputs=[model.state])
        mx.eval(compute())
        mx.reset_peak_memory()
        mx.eval(compute())
        return mx.get_peak_memory()

    kept = peak()
    with recomputed_gates(model):
        recomputed = peak()
    # At the end of the forward pass all layers but the active one keep one array of 8 × 64 × 2048 float32 less.
    assert kept - recomputed > 7 * 8 * 64 * 2048 * 4


@pytest.mark.parametrize("recomputing", [recomputed_blocks, recomputed_gates])
@pytest.mark.parametrize("layers", [-1, 1])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_blocks_with_an_adapter_are_recomputed_too(kind, bits, layers, recomputing):
    settings = ModelConfig(dtype="float32", fine_tune_type=kind, base_bits=bits, lora_layers=layers)
    policy = load_policy(settings, seed=0)
    policy.load_trainable({name: array + 0.01 for name, array in policy.trainable().items()})
    assert_recomputing_changes_no_gradient(policy.model, recomputing)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.ones(64)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x):
        return self.dropout(self.dropout(x * self.weight))


class Layers(nn.Module):
    """f(w) = Σ dropout(dropout(w x)): linear in w, so f(w) = w · ∇f(w) if both passes see the same dropout."""

    def __init__(self):
        super().__init__()
        self.layers = [Layer()]

    def __call__(self, x):
        return self.layers[0](x).sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_backward_pass_drops_the_same_inputs_as_the_forward_pass(compiled):
    model, x = Layers(), mx.arange(1.0, 65.0)
    gradient = nn.value_and_grad(model, lambda model: model(x))
    if compiled:
        state = [model.state, mx.random.state]
        plain = gradient
        gradient = mx.compile(lambda: plain(model), inputs=state, outputs=state)
    else:
        gradient = lambda plain=gradient: plain(model)  # noqa: E731
    forward = nn.Dropout.__call__
    values = []
    with recomputed_blocks(model):
        for _ in range(3):
            value, gradients = gradient()
            assert value.item() == gradients["layers"][0]["weight"].sum().item()
            values.append(value.item())
    assert len(set(values)) == 3, "new inputs are dropped each time"
    # Half of half of the inputs are kept, each four times as large: the sum is 2080 on average.
    assert 1000 < np.mean(values) < 3200
    assert nn.Dropout.__call__ is forward
