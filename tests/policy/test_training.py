import math

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from grpo_actors.config import LearnerConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy import training as policy_training
from grpo_actors.policy.training import Training, learning_rate


class Line(nn.Module):
    """y = w x with w = [1, 2]: simple enough to compute gradients by hand."""

    def __init__(self, dtype=mx.float32):
        super().__init__()
        self.w = mx.array([1.0, 2.0], dtype)


def loss(model, arrays):
    value = (model.w * arrays["x"]).sum().astype(mx.float32)
    return value, mx.stack([value])


def config(**changes):
    return LearnerConfig(**({"learning_rate": 0.1, "max_grad_norm": 0.0} | changes))


def batch(*x):
    return {"x": mx.array(x)}


def test_gradients_of_micro_batches_add_up():
    training = Training(Line(), config(), loss)
    training.accumulate(batch(1.0, 2.0))
    training.accumulate(batch(2.0, 2.0))
    norm, taken = training.step(0.1)
    assert taken
    assert norm == pytest.approx(5.0)  # |[1 + 2, 2 + 2]|


class Three(nn.Module):
    """The sum of three arrays: the gradient of each is x."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (mx.zeros(2) for _ in range(3))


def sum_loss(model, arrays):
    value = ((model.first + model.second + model.third) * arrays["x"]).sum()
    return value, mx.stack([value])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("part", "sizes"), [(4, [2, 1]), (1, [1, 1, 1]), (6, [3])])
def test_a_process_keeps_the_sums_of_what_it_owns_and_adds_up_a_part_at_a_time(
    monkeypatch, part, sizes, compiled
):
    monkeypatch.setattr(policy_training, "GRADIENT_PART", part)
    training = Training(Three(), config(), sum_loss, owned={"first", "third"}, compiled=compiled)
    added = []

    def with_another(arrays):
        """Add up with a process whose gradient is 1 everywhere."""
        added.append(len(arrays))
        arrays[:] = [array + 1.0 for array in arrays]

    training.accumulate(batch(1.0, 2.0), with_another)
    training.accumulate(batch(3.0, 0.0), with_another)
    training.accumulate_nothing(with_another)
    assert added == sizes * 3
    kept = []
    training.change_gradient(lambda arrays: kept.extend(array.tolist() for array in arrays))
    assert kept == [[1.0 + 3.0 + 3.0, 2.0 + 3.0]] * 2
    norm, taken = training.step(0.1)
    assert taken
    assert norm == pytest.approx(math.sqrt(2 * (7.0**2 + 5.0**2)))


def test_what_others_own_takes_no_memory_between_two_micro_batches():
    model = Three()
    model.first, model.second, model.third = (mx.zeros(2**20) for _ in range(3))
    mx.eval(model.parameters())
    training = Training(model, config(), sum_loss, owned={"second"})

    def as_views(arrays):
        shapes, flat = [array.size for array in arrays], mx.concatenate(arrays)
        mx.eval(flat)
        ends = np.cumsum(shapes).tolist()
        arrays[:] = [flat[end - size : end] for end, size in zip(ends, shapes, strict=True)]

    arrays = {"x": mx.ones(2**20)}
    mx.eval(arrays)
    before = mx.get_active_memory()
    for _ in range(2):
        training.accumulate(arrays, as_views)
        # Of the gradient's 12 MiB, 4 are of the array that this process owns.
        assert 0 <= mx.get_active_memory() - before - 4 * 2**20 < 2**16


def test_the_first_step_of_adam_is_as_long_as_the_rate():
    # With bias correction, m / sqrt(v) = g / |g| at the first step; without it the step would be 3.2 times as long.
    model = Line()
    training = Training(model, config(), loss)
    training.accumulate(batch(1.0, -2.0))
    training.step(0.1)
    np.testing.assert_allclose(np.array(model.w), [0.9, 2.1], rtol=1e-6)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_gradients_longer_than_the_limit_are_scaled_down_to_it(limit, expected):
    training = Training(Line(), config(max_grad_norm=limit, adam_beta1=0.0, adam_beta2=0.0), loss)
    training.accumulate(batch(3.0, 4.0))
    norm, _ = training.step(0.1)
    assert norm == pytest.approx(5.0), "the returned norm is that before clipping"
    m = np.array(training.optimizer.state["w"]["m"])  # β1 = 0: the gradient that was applied
    np.testing.assert_allclose(np.linalg.norm(m), expected, rtol=1e-5)


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf, 3e38])  # 3e38² is infinite in float32
def test_a_step_that_is_not_finite_changes_nothing(x):
    model = Line()
    training = Training(model, config(), loss)
    training.accumulate(batch(1.0, 1.0))
    training.step(0.1)
    before = {name: array.tolist() for name, array in training.state().items()}
    w = model.w.tolist()
    training.accumulate(batch(1.0, 1.0))
    training.accumulate(batch(x, 1.0))
    norm, taken = training.step(0.5)
    assert not taken
    assert not math.isfinite(norm)
    assert model.w.tolist() == w
    assert {name: array.tolist() for name, array in training.state().items()} == before
    training.accumulate(batch(1.0, 1.0))
    assert training.step(0.1)[1], "dropped gradients do not affect the next step"


def test_a_step_without_a_gradient_is_not_taken():
    assert Training(Line(), config(), loss).step(0.1) == (0.0, False)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_steps_far_below_half_precision_are_not_lost(dtype):
    # The bfloat16 number below 1 is 1 - 2^-8 = 0.996. 100 steps of 1e-4 add up to 0.01; each alone rounds to 0.
    model = Line(dtype)
    training = Training(model, config(), loss)
    for _ in range(100):
        training.accumulate(batch(1.0, 1.0))
        training.step(1e-4)
    assert model.w.dtype == dtype
    assert model.w[0].item() == mx.array(0.99).astype(dtype).item()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_restored_training_continues_bit_for_bit(dtype, compiled):
    def steps(training, count, rate):
        for i in range(count):
            training.accumulate(batch(1.0 + i, -0.5))
            training.step(rate / (i + 1))

    model, other = Line(dtype), Line(dtype)
    training = Training(model, config(), loss, compiled=compiled)
    steps(training, 3, 0.01)
    resumed = Training(other, config(), loss, compiled=compiled)
    if compiled:
        # Compiled before it is restored: it must not keep the arrays of its first call.
        steps(resumed, 1, 0.3)
    other.w = model.w
    resumed.load_state(training.state())
    steps(training, 4, 0.02)
    steps(resumed, 4, 0.02)
    assert resumed.state().keys() == training.state().keys()
    assert mx.array_equal(other.w, model.w)
    for name, array in training.state().items():
        assert mx.array_equal(array, resumed.state()[name]), name


@pytest.mark.gpu
def test_compiled_and_plain_steps_agree():
    models = [Line(), Line()]
    for model, compiled in zip(models, (False, True), strict=True):
        training = Training(model, config(), loss, compiled=compiled)
        for i in range(5):
            training.accumulate(batch(1.0 + i, 2.0))
            training.step(0.1 / (i + 1))  # the rate must not become a constant of the compiled function
    np.testing.assert_allclose(np.array(models[0].w), np.array(models[1].w), rtol=1e-6)


class Deep(nn.Module):
    """32 matrices of 256 × 256: 8 MiB in float32."""

    def __init__(self):
        super().__init__()
        self.layers = [mx.ones((256, 256), mx.bfloat16) for _ in range(32)]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_holds_only_part_of_the_old_and_new_weights_at_the_same_time(compiled):
    def total(model, arrays):
        value = sum((w * arrays["x"]).sum() for w in model.layers).astype(mx.float32)
        return value, mx.stack([value])

    training = Training(Deep(), config(), total, compiled=compiled)
    for _ in range(2):  # the first one compiles
        training.accumulate(batch(1.0))
        held_bytes = mx.get_active_memory()
        mx.reset_peak_memory()
        training.step(0.1)
    # New weights and two moments, 8 MiB each, at once would be 24 MiB on top.
    assert mx.get_peak_memory() - held_bytes < 9 * 2**20


def test_a_state_of_another_model_is_refused():
    state = Training(Line(), config(), loss).state()
    del state["optimizer.w.m"]
    with pytest.raises(ModelError, match=r"optimizer\.w\.m"):
        Training(Line(), config(), loss).load_state(state)


# --- the schedule ---------------------------------------------------------------------------------


def rates(**changes):
    settings = LearnerConfig(learning_rate=1.0, **changes)
    return [learning_rate(settings, step, 20) for step in range(20)]


def test_the_warm_up_starts_above_zero_and_ends_at_the_peak():
    values = rates(warmup_ratio=0.2, lr_scheduler_type="constant")  # 4 of 20
    assert values == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 17)


def test_the_linear_schedule_falls_evenly_to_above_zero():
    values = rates(warmup_ratio=0.0, lr_scheduler_type="linear")
    assert values == pytest.approx([1 - step / 20 for step in range(20)])
    assert values[-1] == pytest.approx(0.05)


def test_the_cosine_is_at_half_in_the_middle():
    values = rates(warmup_ratio=0.0, lr_scheduler_type="cosine")
    assert values[0] == 1.0
    assert values[10] == pytest.approx(0.5)  # (1 + cos(π / 2)) / 2
    assert 0 < values[-1] < 0.01  # (1 + cos(19π/20)) / 2 = 0.0062


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(kind, ratio, steps):
    settings = LearnerConfig(learning_rate=1e-6, warmup_ratio=ratio, lr_scheduler_type=kind)
    values = [learning_rate(settings, step, steps) for step in range(steps)]
    assert all(0 < value <= 1e-6 for value in values)
