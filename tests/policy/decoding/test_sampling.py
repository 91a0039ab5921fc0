"""Whole completions of the embedded model: log-probs, seeds, batches and ends."""

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.logprobs import completion_logprobs

QUESTIONS = ["What is 12 + 34?", "7", "Tom has 21 apples and buys 3 bags of 14 apples. How many has he now?"]


def prompts_of(policy):
    """Return three prompts of different lengths."""
    return [policy.chat.encode([{"role": "user", "content": text}]) for text in QUESTIONS]


def learners_logprobs(policy, prompt, tokens, temperature):
    ids = mx.array([[*prompt, *tokens, 0, 0, 0]])  # padded as the learner pads
    logprobs, _ = completion_logprobs(
        policy.model, ids, mx.array([len(prompt) - 1]), mx.array([tokens]), temperature
    )
    return np.array(logprobs)[0]


def flat(groups):
    return [sample for group in groups for sample in group]


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recorded_log_probs_are_those_that_the_learner_computes(tiny, temperature):
    prompts, seeds = prompts_of(tiny), [[1, 2, 3], [4], [5, 6]]
    groups = sample_groups(tiny, prompts, seeds, SamplingParams(30, temperature))
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            expected = learners_logprobs(tiny, prompt, sample.tokens, temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


@pytest.mark.gpu
def test_equal_seeds_give_equal_tokens_alone_and_in_any_batch(tiny):
    prompts, seeds = prompts_of(tiny), [[1, 2, 3], [4], [5, 6]]
    params = SamplingParams(30)
    together = sample_groups(tiny, prompts, seeds, params)
    turned = sample_groups(tiny, prompts[::-1], seeds[::-1], params)[::-1]
    alone = [
        [sample_groups(tiny, [p], [[s]], params)[0][0] for s in g]
        for p, g in zip(prompts, seeds, strict=True)
    ]
    for other in (turned, alone):
        for a, b in zip(flat(together), flat(other), strict=True):
            assert a.tokens == b.tokens
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_different_seeds_give_different_tokens(tiny):
    [group] = sample_groups(tiny, prompts_of(tiny)[:1], [list(range(8))], SamplingParams(30))
    assert len({tuple(sample.tokens) for sample in group}) > 1


def test_sampling_leaves_the_global_random_state_alone(tiny):
    mx.random.seed(5)
    before = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    sample_groups(tiny, prompts_of(tiny), [[1], [2], [3]], SamplingParams(5))
    assert mx.random.uniform(shape=(4,)).tolist() == before


def test_greedy_is_the_argmax_of_the_full_logits_at_every_step(tiny):
    prompt = prompts_of(tiny)[0]
    [[sample]] = sample_groups(tiny, [prompt], [[0]], SamplingParams(15, temperature=0.0))
    logits = tiny.model(mx.array([[*prompt, *sample.tokens]]))[0, len(prompt) - 1 : -1]
    assert mx.argmax(logits, axis=-1).tolist() == sample.tokens


def test_the_stop_token_stays_with_its_log_prob_and_nothing_follows_it(tiny):
    prompts, seeds = prompts_of(tiny), [list(range(6))] * 3
    groups = sample_groups(tiny, prompts, seeds, SamplingParams(60))
    finished = [sample for sample in flat(groups) if sample.finished]
    assert finished, "the embedded model ends most of its answers"
    for sample in flat(groups):
        assert len(sample.tokens) == len(sample.logprobs)
        assert not set(sample.tokens[:-1]) & tiny.stop_tokens
        assert (sample.tokens[-1] in tiny.stop_tokens) == sample.finished
        assert sample.finished or len(sample.tokens) == 60


def test_every_one_of_several_stop_tokens_ends_a_completion(tiny):
    prompts, seeds = prompts_of(tiny), [list(range(6))] * 3
    plain = flat(sample_groups(tiny, prompts, seeds, SamplingParams(30)))
    second, third = plain[0].tokens[2], plain[7].tokens[1]
    tiny.stop_tokens = frozenset({*tiny.stop_tokens, second, third})
    stopped = flat(sample_groups(tiny, prompts, seeds, SamplingParams(30)))
    for before, after in zip(plain, stopped, strict=True):
        end = next((i for i, token in enumerate(before.tokens) if token in tiny.stop_tokens), 29)
        assert after.tokens == before.tokens[: end + 1]
        assert after.finished == (before.tokens[end] in tiny.stop_tokens)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(tiny):
    prompts, seeds = prompts_of(tiny), [list(range(6))] * 3
    plain = flat(sample_groups(tiny, prompts, seeds, SamplingParams(30)))
    text = tiny.decode(plain[0].tokens)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for before, after in zip(
        plain,
        flat(sample_groups(tiny, prompts, seeds, SamplingParams(30, stop=(stop, "never")))),
        strict=True,
    ):
        assert after.tokens == before.tokens[: len(after.tokens)]
        if stop in tiny.decode(before.tokens):
            assert after.finished
            assert stop in tiny.decode(after.tokens)
            assert stop not in tiny.decode(after.tokens[:-1])
        else:
            assert after.tokens == before.tokens


def test_a_completion_cut_at_the_limit_is_not_finished(tiny):
    groups = sample_groups(tiny, prompts_of(tiny), [[1], [2], [3]], SamplingParams(2))
    assert [(len(s.tokens), s.finished) for s in flat(groups)] == [(2, False)] * 3


def test_one_new_token_is_enough(tiny):
    [[sample]] = sample_groups(tiny, prompts_of(tiny)[:1], [[1]], SamplingParams(1))
    assert len(sample.tokens) == 1


def test_on_step_counts_each_token_once(tiny):
    counts: list[int] = []
    groups = sample_groups(tiny, prompts_of(tiny), [list(range(5))] * 3, SamplingParams(60), counts.append)
    assert sum(counts) == sum(len(sample.tokens) for sample in flat(groups))
    assert counts[0] == 15
    assert counts == sorted(counts, reverse=True), "completions only ever end"


def test_on_step_can_stop_the_sampling(tiny):
    class Enough(Exception):  # noqa: N818
        pass

    def stop(new_tokens: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        sample_groups(tiny, prompts_of(tiny), [[1], [2], [3]], SamplingParams(60), stop)


def test_the_repetition_penalty_applies_to_every_token_seen_in_prompt_or_completion(tiny):
    # With greedy sampling and a huge penalty, a token with a positive logit occurs at most once.
    prompt = prompts_of(tiny)[0]
    params = SamplingParams(12, temperature=0.0, repetition_penalty=1e9)
    [[sample]] = sample_groups(tiny, [prompt], [[1]], params)
    assert len(set(sample.tokens)) == len(sample.tokens)
    assert not set(sample.tokens) & set(prompt)


@pytest.mark.gpu
def test_filters_work_with_ragged_prompts_and_shrinking_batches(tiny):
    params = SamplingParams(40, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    prompts, seeds = prompts_of(tiny), [[1, 2, 3], [4], [5, 6]]
    together = flat(sample_groups(tiny, prompts, seeds, params))
    alone = [
        sample_groups(tiny, [p], [[s]], params)[0][0] for p, g in zip(prompts, seeds, strict=True) for s in g
    ]
    assert [s.tokens for s in together] == [s.tokens for s in alone]


def test_a_long_generation_runs_past_the_steps_in_which_a_cache_grows(tiny):
    tiny.stop_tokens = frozenset()
    prompt = prompts_of(tiny)[0]
    [[sample]] = sample_groups(tiny, [prompt], [[3]], SamplingParams(300))  # caches grow by 256
    np.testing.assert_allclose(
        sample.logprobs, learners_logprobs(tiny, prompt, sample.tokens, 1.0), atol=1e-4
    )
