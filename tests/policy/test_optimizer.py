"""Each optimizer against its formula in float64, and the weight decay that all of them share."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from grpo_actors.config import LearnerConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.training import Training

OPTIMIZERS = ["adamw", "adam", "muon", "lion", "adafactor"]
RATE = 0.01


class Layer(nn.Module):
    def __init__(self, wide, rng):
        super().__init__()
        self.weight = mx.array(rng.normal(size=wide).astype(np.float32))
        self.bias = mx.array(rng.normal(size=wide[0]).astype(np.float32))


class Model(nn.Module):
    """An embedding; layers with a tall matrix, a wide one, a vector and a stack of matrices; a head."""

    def __init__(self, dtype=mx.float32):
        super().__init__()
        rng = np.random.default_rng(0)
        self.embedding = mx.array(rng.normal(size=(7, 5)).astype(np.float32))
        self.layers = [Layer((8, 5), rng), Layer((5, 8), rng), nn.RMSNorm(5), Layer((2, 3, 4), rng)]
        self.lm_head = mx.array(rng.normal(size=(7, 5)).astype(np.float32))
        self.set_dtype(dtype)


def loss(model, arrays):
    """Return Σ c · w²/2 over all weights: the gradient is c · w, and `c` changes at every step."""
    total = mx.array(0.0)
    for _, w in sorted(flat(model).items()):
        total = total + (arrays["c"] * w.astype(mx.float32).square() / 2).sum()
    return total, total[None]


def flat(model):
    return dict(nn.utils.tree_flatten(model.trainable_parameters()))


def numbers(model):
    return {name: np.array(w.astype(mx.float32), dtype=np.float64) for name, w in flat(model).items()}


def config(optimizer, **changes):
    settings = {"optimizer": optimizer, "learning_rate": RATE, "max_grad_norm": 0.0} | changes
    return LearnerConfig(**settings)


def advance(training, steps):
    for c, rate in steps:
        training.accumulate({"c": mx.array(c)})
        assert training.step(rate)[1]


STEPS = [(1.0, RATE), (-0.5, RATE / 2), (2.0, RATE / 4)]


# --- the formulas ---------------------------------------------------------------------------------


def adam(w, decay):
    """Compute 1412.6980 with the decay of 1711.05101."""
    m = v = 0.0
    for t, (c, rate) in enumerate(STEPS, 1):
        g = c * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        w = w - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * w)
    return w


def lion(w, decay):
    """Compute algorithm 2 of 2302.06675."""
    m = 0.0
    for c, rate in STEPS:
        g = c * w
        direction = np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        w = w - rate * (direction + decay * w)
    return w


def adafactor(w, decay):
    """Compute algorithms 4 and 5 of 1804.04235 without the relative rate: β2 of step t is 1 − t^−0.8."""
    rows = columns = v = 0.0
    for t, (c, rate) in enumerate(STEPS, 1):
        g = c * w
        beta = 1 - t**-0.8
        if w.ndim >= 2:
            rows = beta * rows + (1 - beta) * (g**2).mean(axis=-1, keepdims=True)
            columns = beta * columns + (1 - beta) * (g**2).mean(axis=-2, keepdims=True)
            v = rows * columns / rows.mean(axis=-2, keepdims=True)
        else:
            v = beta * v + (1 - beta) * g**2
        update = g / np.sqrt(v)
        update = update / max(1.0, np.sqrt((update**2).mean()))
        w = w - rate * (update + decay * w)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "formula"), [("adamw", adam), ("adam", adam), ("lion", lion), ("adafactor", adafactor)]
)
def test_the_first_steps_match_the_papers_formulas(name, formula, decay):
    model = Model()
    expected = {key: formula(w, decay if w.ndim >= 2 else 0.0) for key, w in numbers(model).items()}
    advance(Training(model, config(name, weight_decay=decay), loss), STEPS)
    for key, w in numbers(model).items():
        np.testing.assert_allclose(w, expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("c", [1.0, -0.5])
def test_muon_moves_a_hidden_matrix_equally_in_every_direction_and_as_far_as_adam(c):
    model = Model()
    before = numbers(model)
    advance(Training(model, config("muon"), loss), [(c, RATE)])
    for key in ("layers.0.weight", "layers.1.weight"):
        step = (before[key] - numbers(model)[key]) / RATE
        # Singular values of 1 in 5 directions, times 0.2 · √8; five Newton–Schulz steps leave them within 0.7..1.2.
        singular = np.linalg.svd(step / (0.2 * np.sqrt(8)), compute_uv=False)
        assert singular.shape == (5,)
        assert ((singular > 0.65) & (singular < 1.25)).all(), singular
        # Root mean square: √(5 · 0.2² · 8 / 40) = 0.2.
        assert np.sqrt((step**2).mean()) == pytest.approx(0.2, rel=0.2)
        # The gradient is c · w, without a decay.
        assert np.sign((step * before[key]).sum()) == np.sign(c)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_leaves_embedding_head_vectors_and_stacks_to_adamw(decay):
    model = Model()
    expected = {key: adam(w, decay if w.ndim >= 2 else 0.0) for key, w in numbers(model).items()}
    advance(Training(model, config("muon", weight_decay=decay), loss), STEPS)
    same = {key for key, w in numbers(model).items() if np.allclose(w, expected[key], rtol=2e-5, atol=2e-6)}
    assert numbers(model).keys() - same == {"layers.0.weight", "layers.1.weight"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_a_share_of_each_matrix_and_nothing_else(name):
    plain, decaying = Model(), Model()
    before = numbers(plain)
    advance(Training(plain, config(name), loss), STEPS[:1])
    advance(Training(decaying, config(name, weight_decay=0.5), loss), STEPS[:1])
    for key, w in before.items():
        share = RATE * 0.5 if w.ndim >= 2 else 0.0
        np.testing.assert_allclose(
            numbers(plain)[key] - numbers(decaying)[key], share * w, atol=1e-6, err_msg=key
        )


@pytest.mark.parametrize("name", ["adamw", "adam", "muon", "adafactor"])
def test_a_step_is_about_as_large_as_the_rate_with_every_optimizer(name):
    model = Model()
    before = numbers(model)
    advance(Training(model, config(name), loss), STEPS[:1])
    for key, w in before.items():
        step = np.sqrt(((numbers(model)[key] - w) ** 2).mean())
        assert 0.15 * RATE < step < 1.05 * RATE, key


# --- continuing -----------------------------------------------------------------------------------

#: Types of the weights, and whether steps are compiled. On a CPU each type's kernels take half a minute to compile at first.
WAYS = pytest.mark.parametrize(
    ("dtype", "compiled"),
    [
        (mx.float32, False),
        (mx.float32, True),
        (mx.bfloat16, False),
        pytest.param(mx.bfloat16, True, marks=pytest.mark.slow),
    ],
)


@WAYS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_steps_a_saved_state_and_a_third_step_equal_three_steps(name, dtype, compiled, tmp_path):
    settings = config(name, weight_decay=0.1)
    straight, other = Model(dtype), Model(dtype)
    training = Training(straight, settings, loss, compiled=compiled)
    advance(training, STEPS[:2])
    mx.save_safetensors(str(tmp_path / "state"), training.state(), {})
    resumed = Training(other, settings, loss, compiled=compiled)
    if compiled:
        # Compiled before it is restored: it must not keep the arrays of its first call.
        advance(resumed, STEPS[2:])
    other.update(straight.trainable_parameters())
    resumed.load_state(mx.load(str(tmp_path / "state.safetensors")))
    for each in (training, resumed):
        advance(each, STEPS[2:])
    assert resumed.state().keys() == training.state().keys()
    for key, array in (training.state() | flat(straight)).items():
        assert mx.array_equal(array, (resumed.state() | flat(other))[key]), key


# --- several owners -------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_owners_that_exchange_what_they_moved_take_the_steps_of_one_and_load_its_state(name, dtype, compiled):
    settings = config(name, weight_decay=0.1)
    # Each but the last has a matrix, a vector or a stack; the last one owns nothing.
    names = sorted(flat(Model()))
    owned = [names[::2], names[1::2], []]
    whole, *models = (Model(dtype) for _ in range(4))
    one = Training(whole, settings, loss, compiled=compiled)
    owners = [
        Training(model, settings, loss, owned=own, compiled=compiled)
        for model, own in zip(models, owned, strict=True)
    ]

    def all_step(step):
        for training in (one, *owners):
            advance(training, [step])
        moved = {name: owners[i].weights()[name] for i, own in enumerate(owned) for name in own}
        for training in owners:
            training.replace_weights(moved)

    for step in STEPS[:2]:
        all_step(step)
    for training in owners:
        training.load_state(one.state())
        assert not training.take_loaded().keys() & training.state().keys()
        assert not training.take_loaded(), "only once"
    all_step(STEPS[2])
    exactly = (
        {} if compiled else {"rtol": 0}
    )  # compiled for another set of arrays, products may be fused otherwise
    together = {key: array for training in reversed(owners) for key, array in training.state().items()}
    assert together.keys() == one.state().keys()
    assert not any(".bias" in key or "embedding" in key for key in owners[2].state())
    for key, array in one.state().items():
        np.testing.assert_allclose(np.array(together[key]), np.array(array), err_msg=key, **exactly)
    for model in models:
        for key, w in numbers(whole).items():
            np.testing.assert_allclose(numbers(model)[key], w, err_msg=key, **exactly)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_steps_equal_plain_steps(name):
    models = [Model(), Model()]
    for model, compiled in zip(models, (False, True), strict=True):
        advance(Training(model, config(name, weight_decay=0.1), loss, compiled=compiled), STEPS)
    for key, w in numbers(models[0]).items():
        np.testing.assert_allclose(numbers(models[1])[key], w, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_far_below_half_precision_are_not_lost(name):
    model = Model(mx.bfloat16)
    before = numbers(model)
    training = Training(model, config(name), loss)
    advance(training, [(1.0, 1e-5)] * 4)
    masters = {key.removeprefix("weights."): w for key, w in training.state().items() if "weights." in key}
    assert masters.keys() == before.keys()
    for key, w in masters.items():
        moved = np.abs(np.array(w, dtype=np.float64) - before[key])
        assert 2e-6 < moved.mean() < 5e-5, key  # four times 1e-5, or with Muon a fifth of that


def test_the_state_of_another_optimizer_is_refused():
    state = Training(Model(), config("lion"), loss).state()
    with pytest.raises(ModelError, match="another model or optimizer"):
        Training(Model(), config("adamw"), loss).load_state(state)
