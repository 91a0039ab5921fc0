"""Draws from one distribution: they follow the probabilities, the filters and the penalty."""

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.policy.decoding.draw import Sample, SamplingParams, _filter, _first, draw, draws

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
        # Of the two that top-k leaves, 0 has .493 / (.493 + .299) = .62.
        ({"top_p": 0.6, "top_k": 2}, {0}),
        ({"top_p": 0.65, "top_k": 2}, {0, 5}),
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


#: Rows of a vocabulary like Qwen's, from nearly even to nearly certain.
WIDE = np.random.default_rng(0).normal(0, [[1.0], [2.0], [3.0], [4.0]], (4, 151_936)).astype(np.float32)
#: The filters that are compared.
FILTERS = [
    {"top_p": 0.9},
    {"top_p": 0.99},
    {"top_p": 0.999},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 50},
    {"top_k": 1000, "top_p": 0.95, "min_p": 0.05},
    {"min_p": 0.001},
]


def kept(logits, params):
    """Return which tokens [R, V] a filter leaves, and their probabilities without it in float64."""
    weights = mx.exp(mx.array(logits) - mx.array(logits).max(axis=-1, keepdims=True))
    probabilities = np.exp(logits.astype(np.float64))
    return np.array(_filter(weights, params)) > 0, probabilities / probabilities.sum(axis=1, keepdims=True)


def kept_by_definition(probabilities, params):
    """The filters one after the other, in float64: each on the distribution that the one before it left."""
    left = probabilities.copy()
    order = np.argsort(-left, axis=1)
    if params.top_k:
        np.put_along_axis(left, order[:, params.top_k :], 0, axis=1)
    ranked = np.take_along_axis(left, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked
    outside = before >= params.top_p * ranked.sum(axis=1, keepdims=True)
    np.put_along_axis(left, order, np.where(outside, 0, ranked), axis=1)
    return (left > 0) & (left >= params.min_p * left.max(axis=1, keepdims=True))


@pytest.mark.gpu
@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filters_of_a_large_vocabulary_leave_the_share_that_they_name(params):
    limits = SamplingParams(1, **params)
    ours, probabilities = kept(WIDE, limits)
    exact = kept_by_definition(probabilities, limits)
    share, expected = ((probabilities * mask).sum(axis=1) for mask in (ours, exact))
    # Tokens at the edge weigh 1e-7 to 1e-5 each. A sum from the top kept 0.89982, 0.98978 and 0.99879.
    np.testing.assert_allclose(share, expected, atol=2e-6)
    np.testing.assert_allclose(ours.sum(axis=1), exact.sum(axis=1), rtol=1e-4, atol=0.5)
    if params.keys() == {"top_p"}:  # the fewest tokens that have this share
        rarest = np.where(ours, probabilities, 1).min(axis=1)
        assert (share > params["top_p"] - 2e-6).all()
        assert (share - rarest < params["top_p"] + 2e-6).all()


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filters_leave_what_the_warpers_of_transformers_leave(params):
    torch = pytest.importorskip("torch", reason="transformers' warpers need torch")
    from transformers.generation import logits_process

    limits = SamplingParams(1, **params)
    scores = torch.tensor(WIDE)
    for name, warper in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
        if name in params:
            scores = getattr(logits_process, f"{warper}LogitsWarper")(params[name])(None, scores)
    theirs = torch.isfinite(scores).numpy()
    ours, probabilities = kept(WIDE, limits)
    np.testing.assert_allclose(*((probabilities * mask).sum(axis=1) for mask in (ours, theirs)), atol=2e-6)
    np.testing.assert_allclose(ours.sum(axis=1), theirs.sum(axis=1), rtol=1e-4, atol=0.5)


@pytest.mark.parametrize("top_p", [1e-12, 1e-8, 1 - 1e-7])
def test_the_best_token_stays_however_small_its_share_may_be(top_p):
    ours, _ = kept(WIDE, SamplingParams(1, top_p=top_p))
    assert ours[np.arange(4), WIDE.argmax(axis=1)].all()


def test_equal_tokens_are_cut_too():
    ours, _ = kept(np.zeros((1, 100), np.float32), SamplingParams(1, top_p=0.505))
    assert ours.sum() == 51


def test_an_entry_without_weight_is_never_drawn_even_if_a_scan_is_not_monotone():
    """What a parallel scan may give: reached, then not, then reached again; or nothing is reached."""
    weights = mx.array([[0.0, 0.5, 0.0, 0.2, 0.7]] * 3)
    reached = mx.array([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 1]]) == 1
    # Row 0: 0 and 2 were filtered. Row 1: only a filtered one is reached, so the heaviest is taken.
    assert _first(reached, weights).tolist() == [3, 4, 1]


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_logits_of_any_size_can_be_filtered(shift):
    tokens, _ = many(LOGITS + shift, top_k=2)  # e^300 is beyond float32
    assert set(tokens.tolist()) == {0, 5}


@pytest.mark.parametrize(("vocabulary", "token"), [(2, 1), (256, 128)])
def test_a_uniform_that_is_exactly_a_cumulative_share_draws_the_token_after_it(vocabulary, token):
    # All weights are 1. Half of 2 ends with token 0, half of 256 with the first block of 128.
    tokens, _ = draw(mx.zeros((1, vocabulary)), mx.array([0.5]), SamplingParams(1))
    assert tokens.tolist() == [token]


def test_ties_at_the_edge_of_top_k_admit_no_further_tokens():
    tokens, _ = many(np.zeros(6), top_k=2)
    assert len(set(tokens.tolist())) == 2


def test_greedy_takes_the_best_and_records_its_log_prob_at_temperature_one():
    tokens, logprobs = many(temperature=0.0)
    assert set(tokens.tolist()) == {0}
    np.testing.assert_allclose(logprobs, np.log(softmax(LOGITS)[0]), atol=1e-6)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2.0, -0.5, 0.5, 0.0, -3.0, 1.5])
    seen = np.array([True, True, True, False, False, False])
    penalised = np.array([1.0, -1.0, 0.25, 0.0, -3.0, 1.5])  # penalty 2: 2 / 2, −0.5 · 2 and 0.5 / 2
    tokens, logprobs = many(logits, seen=seen, repetition_penalty=2.0)
    assert chi_square(tokens, softmax(penalised)) < 25.7
    # The recorded log-prob is the policy's, without the penalty.
    np.testing.assert_allclose(logprobs, np.log(softmax(logits))[tokens], atol=1e-6)


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


def test_by_default_nothing_narrows_or_bounds_the_distribution():
    params = SamplingParams(5)
    assert not params.filters
    assert (params.think_tokens, params.max_kv_tokens, params.kv_bits) == (0, 0, 0)
    for narrow in ({"top_p": 0.99}, {"top_k": 1}, {"min_p": 0.01}):
        assert SamplingParams(5, **narrow).filters


def test_a_sample_counts_the_tokens_of_the_policy_and_knows_its_last_turn():
    sample = Sample()
    assert (sample.sampled, sample.turn_start, sample.turn, sample.finished) == (0, 0, [], False)
    for token in range(12):
        sample.append(token, -token / 8, 5)
    assert (sample.tokens, sample.versions) == (list(range(12)), [5] * 12)
    assert sample.logprobs == [-token / 8 for token in range(12)]
    assert (sample.sampled, sample.turn_start, sample.turn) == (12, 0, sample.tokens)
    sample.spans, sample.forced = [2, 4, 6, 7], [9, 11]
    # The environment inserted 2 + 1, and a closing tag has 2.
    assert (sample.sampled, sample.turn_start, sample.turn) == (12 - 5, 7, [7, 8, 9, 10, 11])
