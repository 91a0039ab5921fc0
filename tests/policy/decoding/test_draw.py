"""Draws from one distribution: they follow the probabilities, the filters and the penalty."""

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.policy.decoding.draw import SamplingParams, _first, draw, draws

DRAWS = 40_000
LOGITS = np.array([2.0, -1.0, 0.5, 0.0, -3.0, 1.5])


def many(logits=LOGITS, *, seed=7, seen=None, **params):
    """Return tokens and log-probs of `DRAWS` draws from one row of logits."""
    rows = mx.broadcast_to(mx.array(logits, mx.float32), (DRAWS, len(logits)))
    if seen is not None:
        seen = mx.broadcast_to(mx.array(seen), rows.shape)
    token, logprob = draw(rows, mx.array(draws(seed, DRAWS)), SamplingParams(1, **params), seen)
    return np.array(token), np.array(logprob)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def chi_square(tokens, probabilities):
    expected = probabilities * DRAWS
    return ((np.bincount(tokens, minlength=len(expected)) - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_of_the_temperature(temperature):
    p = softmax(LOGITS / temperature)
    tokens, logprobs = many(temperature=temperature)
    # 6 cells: 5 degrees of freedom, whose 99.99 % quantile is 25.7. The rarest has 0.5: 40,000 · e^-6/Σ > 1.
    assert chi_square(tokens, p) < 25.7
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-6)


def test_draws_follow_the_distribution_that_a_filter_leaves():
    p = softmax(LOGITS)
    left = np.where(np.isin(np.arange(6), [0, 2, 5]), p, 0)  # the three best
    tokens, logprobs = many(top_k=3)
    kept = np.flatnonzero(left)
    observed, expected = np.bincount(tokens, minlength=6)[kept], DRAWS * left[kept] / left.sum()
    assert set(tokens.tolist()) == {0, 2, 5}
    # 3 cells: 2 degrees of freedom, whose 99.99 % quantile is 18.4.
    assert ((observed - expected) ** 2 / expected).sum() < 18.4
    # The recorded log-prob is the one that the learner computes: the policy's, not the filtered one.
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-6)


# softmax(LOGITS) = [.493, .025, .110, .067, .003, .299]: sorted, with the sum before each in brackets,
# 0: .493 (0), 5: .299 (.493), 2: .110 (.792), 3: .067 (.902), 1: .025 (.969), 4: .003 (.994).
@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 5}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.001}, {0}),
        ({"top_p": 0.75}, {0, 5}),
        ({"top_p": 0.85}, {0, 5, 2}),
        ({"min_p": 0.5}, {0, 5}),  # .299 / .493 = .61, .110 / .493 = .22
        ({"min_p": 0.2}, {0, 5, 2}),
        ({"min_p": 0.999}, {0}),
        ({"top_p": 0.85, "top_k": 2}, {0, 5}),
        ({"top_k": 5, "min_p": 0.1}, {0, 5, 2, 3}),  # .067 / .493 = .136
    ],
)
def test_a_filter_keeps_exactly_the_tokens_it_names(params, allowed):
    tokens, _ = many(**params)
    assert set(tokens.tolist()) == allowed


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}, {}])
def test_no_draw_at_the_ends_of_the_interval_picks_a_token_without_weight(params):
    # The best token comes last among those with weight, so a filter removes those before it. 1 − 2^-24 is the largest
    # float32 below 1.
    logits = mx.array([[-30.0, 0.0, -30.0, 1.0, -200.0]] * 4)
    uniform = mx.array([0.0, 1e-30, 0.5, 1 - 2**-24])
    tokens, logprobs = draw(logits, uniform, SamplingParams(1, **params))
    allowed = {3} if params.get("min_p") or params.get("top_p") else {1, 3} if params else {0, 1, 2, 3}
    assert set(tokens.tolist()) <= allowed
    assert np.isfinite(np.array(logprobs)).all()


def test_a_large_vocabulary_never_yields_a_filtered_token():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (64, 50_000)).astype(np.float32)
    best = np.argsort(-logits, axis=1)[:, :40]
    for uniform in (0.0, 0.3, 1 - 2**-24):
        tokens, _ = draw(mx.array(logits), mx.full((64,), uniform), SamplingParams(1, top_k=40))
        assert all(token in row for token, row in zip(tokens.tolist(), best, strict=True))


def test_an_entry_without_weight_is_never_drawn_even_if_a_scan_is_not_monotone():
    """What a parallel scan may give: reached, then not, then reached again; or nothing is reached."""
    weights = mx.array([[0.0, 0.5, 0.0, 0.2, 0.7]] * 3)
    reached = mx.array([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 1]]) == 1
    # Row 0: 0 and 2 were filtered. Row 1: only a filtered one is reached, so the heaviest is taken.
    assert _first(reached, weights).tolist() == [3, 4, 1]


def test_ties_at_the_edge_of_top_k_admit_no_further_tokens():
    tokens, _ = many(np.zeros(6), top_k=2)
    assert len(set(tokens.tolist())) == 2


def test_greedy_takes_the_best_and_records_its_log_prob_at_temperature_one():
    tokens, logprobs = many(temperature=0.0)
    assert set(tokens.tolist()) == {0}
    np.testing.assert_allclose(logprobs, np.log(softmax(LOGITS)[0]), atol=1e-6)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    seen = np.array([True, True, False, False, False, False])
    penalised = np.array([1.0, -2.0, 0.5, 0.0, -3.0, 1.5])  # penalty 2: 2 / 2 and −1 · 2
    tokens, logprobs = many(seen=seen, repetition_penalty=2.0)
    assert chi_square(tokens, softmax(penalised)) < 25.7
    # The recorded log-prob is the policy's, without the penalty.
    np.testing.assert_allclose(logprobs, np.log(softmax(LOGITS))[tokens], atol=1e-6)


def test_a_penalty_can_change_the_greedy_choice():
    seen = np.array([True, False, False, False, False, False])
    tokens, _ = many(seen=seen, repetition_penalty=2.0, temperature=0.0)
    assert set(tokens.tolist()) == {5}  # 2 / 2 = 1 is now below 1.5


def test_half_precision_logits_are_summed_in_float32():
    logits = mx.zeros((1, 4096), mx.bfloat16)
    _, logprob = draw(logits, mx.array([0.5]), SamplingParams(1))
    assert logprob.dtype == mx.float32
    assert logprob.item() == pytest.approx(-np.log(4096), abs=1e-5)


def test_the_uniforms_of_a_sample_depend_on_its_seed_alone():
    long, short = draws(2**64 - 1, 50), draws(2**64 - 1, 20)
    np.testing.assert_array_equal(long[:20], short)
    assert (draws(1, 20) != draws(2, 20)).any()
    assert draws(0, 100_000).max() < 1.0


def test_only_parameters_that_narrow_the_distribution_are_reported_as_a_bias():
    assert SamplingParams(5, temperature=0.7, stop=("x",)).bias is None
    assert "top_p = 0.9, repetition_penalty = 1.1" in (
        SamplingParams(5, top_p=0.9, repetition_penalty=1.1).bias or ""
    )
