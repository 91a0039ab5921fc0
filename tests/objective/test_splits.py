"""The gradient of one update does not depend on how the update is cut, padded, ordered and compiled.

The model is a table of logits by the last token (a bigram), large enough to use every part of the packing.
"""

import mlx.core as mx
import numpy as np
import pytest
from updates import RandomUpdate, inputs_of

from grpo_actors.config.objective import LOSSES, ObjectiveConfig
from grpo_actors.objective.aggregation import AGGREGATIONS
from grpo_actors.objective.batch_loss import objective_loss
from grpo_actors.objective.statistics import add_statistics, summary

VOCABULARY = 11


def bigram_logprobs(table, batch):
    """Log-probs of the targets, [N, C], and the entropies of their distributions."""
    logits = table[batch["tokens"].flatten()[batch["inputs_at"]]]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, batch["targets"][:, None], axis=-1)[:, 0]
    entropies = -(mx.exp(logprobs) * logprobs).sum(axis=-1)
    return chosen[batch["target_at"]], entropies[batch["target_at"]]


def gradient(update, objective, table, *, compiled=False, **packing):
    """The gradient with respect to the table, summed over micro-batches as the learner does."""

    def part(table, batch, extra):
        logprobs, entropies = bigram_logprobs(table, batch)
        return objective_loss(logprobs, batch, objective, **{**extra, "entropies": entropies})

    step = mx.value_and_grad(part)
    step = mx.compile(step) if compiled else step
    total = statistics = None
    packed = update.packed(objective, **packing)
    for m in packed.micro_batches:
        extra = {k: v for k, v in inputs_of(update, m, objective).items() if v is not None}
        (_, sums), g = step(table, m.arrays(), extra)
        total = g if total is None else total + g
        statistics = add_statistics(statistics, sums)
    return np.array(total), summary(statistics), len(packed.micro_batches)


@pytest.fixture(scope="module")
def update():
    return RandomUpdate(31, groups=4)


@pytest.fixture(scope="module")
def table():
    return mx.random.normal((VOCABULARY, VOCABULARY), key=mx.random.key(3))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


OBJECTIVES = [
    *(ObjectiveConfig(loss=loss, kl_coeff=0.1, entropy_coeff=0.01) for loss in LOSSES),
    *(ObjectiveConfig(aggregation=name) for name in AGGREGATIONS),
    ObjectiveConfig(ratio="recomputed", correction="sequence_truncate", top_entropy_share=0.5),
    ObjectiveConfig(mask_truncated=True, aggregation="dr_grpo"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.loss}-{o.aggregation}-{o.correction}")
def test_splits_padding_and_order_do_not_reach_the_gradient(update, table, objective):
    whole, in_whole, parts = gradient(update, objective, table, rows=64)
    assert parts == 1
    assert np.linalg.norm(whole) > 1e-3
    active = update.packed(objective).active
    shuffled = np.random.default_rng(0).permutation(update.size).tolist()
    ways = {
        "2 micro-batches": {"rows": -(-active // 2)},
        "8 micro-batches": {"rows": -(-active // 8)},
        "one completion each": {"rows": 1},
        "one completion a row": {"rows": 64, "shared": False},
        "few shapes, much padding": {"rows": 64, "fixed_row": 64, "longest": 64},
        "few shapes, a completion each": {"rows": 1, "fixed_row": 64, "longest": 16},
        "shuffled": {"rows": 5, "order": shuffled},
    }
    for way, packing in ways.items():
        cut, in_cut, _ = gradient(update, objective, table, **packing)
        assert relative(cut, whole) < 1e-6, way
        assert in_cut == pytest.approx(in_whole, rel=1e-4, abs=1e-6), way


# On the CPU MLX compiles about twenty kernels for each of these with the system's C++ compiler: seconds each time.
COMPILED = [
    pytest.param(objective, marks=[] if objective == ObjectiveConfig() else [pytest.mark.slow])
    for objective in OBJECTIVES
]


@pytest.mark.parametrize("objective", COMPILED, ids=lambda o: f"{o.loss}-{o.aggregation}-{o.correction}")
def test_compiled_and_cut_at_once_is_still_the_same_gradient(update, table, objective):
    whole, in_whole, _ = gradient(update, objective, table, rows=64)
    cut, in_cut, parts = gradient(update, objective, table, rows=4, compiled=True)
    assert parts > 2
    assert relative(cut, whole) < 1e-6
    assert in_cut == pytest.approx(in_whole, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.loss}-{o.aggregation}-{o.correction}")
def test_every_objective_can_be_traced_by_the_compiler(update, objective):
    # Without evaluation no kernel is built; MLX already raises here for what it cannot compile.
    m = update.packed(objective).micro_batches[0]
    batch = m.arrays()
    extra = {k: v for k, v in inputs_of(update, m, objective).items() if v is not None}

    def part(logprobs, batch, extra):
        return objective_loss(logprobs, batch, objective, **extra)

    (loss, _), _ = mx.compile(mx.value_and_grad(part))(batch["behaviour_logprobs"], batch, extra)
    assert loss.shape == ()


def test_ranks_that_take_every_second_micro_batch_add_up_to_the_whole(update, table):
    objective = ObjectiveConfig(aggregation="grpo")
    whole, _, _ = gradient(update, objective, table, rows=64)

    def of_rank(rank):
        total = mx.zeros_like(table)
        for m in update.packed(objective, rows=2).micro_batches[rank::2]:
            batch = m.arrays()

            def part(t, batch=batch):
                return objective_loss(bigram_logprobs(t, batch)[0], batch, objective)[0]

            total = total + mx.grad(part)(table)
        return np.array(total)

    assert relative(of_rank(0) + of_rank(1), whole) < 1e-6


def test_a_compiled_step_is_traced_once_for_each_shape(update, table):
    traces, objective = [], ObjectiveConfig()

    def part(table, batch):
        traces.append(batch["tokens"].shape)
        return objective_loss(bigram_logprobs(table, batch)[0], batch, objective)

    step = mx.compile(mx.value_and_grad(part))
    micro_batches = update.packed(objective, rows=4, tokens=64, fixed_row=32, longest=12).micro_batches
    for m in [*micro_batches, *micro_batches]:
        step(table, m.arrays())
    assert len(micro_batches) > 2
    assert len(traces) == len({m.tokens.shape for m in micro_batches}) <= 2  # one row, or two
