"""Completions of several turns: the tokens between them, and the same sampled tokens as in a loop by hand."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx_lm.models.cache import make_prompt_cache

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.policy.decoding.batching import Sampler
from grpo_actors.policy.decoding.draw import draw, draws
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.model import load_policy

QUESTIONS = ["What is 12 + 34?", "7", "There are 21 pears and 14 plums. How many are there in all?"]
SEEDS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>You help.<|end|>\n{% endif %}{% for m in messages %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def prompts(tiny):
    return [tiny.chat.encode([{"role": "user", "content": text}]) for text in QUESTIONS]


def ids(policy, text):
    return policy.tokenizer.encode(text, add_special_tokens=False)


def asks(policy, text="And 5 more?", times=1):
    """Return a function that replies to the first `times` turns with one text, in the embedded model's chat template."""
    reply = ids(policy, f"<|user|>{text}<|end|><|assistant|>")
    return lambda sample: reply if len(sample.spans) < 2 * times else None


def by_hand(policy, prompt, seed, params, respond):
    """Sample token by token with mlx-lm's cache; return tokens, log-probs, bounds of the spans, and whether it finished."""
    uniforms, cache = mx.array(draws(seed, params.max_new_tokens)), make_prompt_cache(policy.model)
    policy.model(mx.array([prompt[:-1]]), cache=cache)
    fed, tokens, logprobs, bounds, given = prompt[-1], [], [], [], {}
    seen = np.zeros((1, policy.model(mx.array([[1]])).shape[-1]), np.bool_)
    seen[0, prompt] = True
    while len(tokens) < params.max_new_tokens:
        at = len(tokens)
        logits = policy.model(mx.array([[fed]]), cache=cache)[:, -1]
        penalised = mx.array(seen) if params.repetition_penalty != 1 else None
        token, logprob = draw(logits, uniforms[at : at + 1], params, penalised)
        fed = given.get(at, token.item())
        tokens.append(fed)
        logprobs.append(0.0 if at in given else logprob.item())
        seen[0, fed] = True
        if at in given or fed not in policy.stop_tokens:
            continue
        stub = type("Stub", (), {"spans": bounds})
        reply = respond(stub)
        if reply is None or len(tokens) + len(reply) >= params.max_new_tokens:
            return tokens, logprobs, bounds, reply is None
        given = {len(tokens) + i: each for i, each in enumerate(reply)}
        bounds = [*bounds, len(tokens), len(tokens) + len(reply)]
    return tokens, logprobs, bounds, False


def assert_is(sample, tokens, logprobs, bounds, finished):
    assert sample.tokens == tokens
    assert sample.spans == bounds
    assert sample.finished == finished
    np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)


# --- sampling -------------------------------------------------------------------------------------


@functools.cache
def made_by_hand(repetition_penalty):
    """Return the parameters with a repetition penalty, and what `by_hand` makes of each prompt and seed."""
    policy = load_policy(ModelConfig(dtype="float32"), seed=0)
    params = SamplingParams(120, repetition_penalty=repetition_penalty)
    chats = [policy.chat.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    respond = asks(policy, times=2)
    return params, {
        seed: by_hand(policy, prompt, seed, params, respond)
        for prompt, seeds in zip(chats, SEEDS, strict=True)
        for seed in seeds
    }


@pytest.mark.parametrize(("max_rows", "penalty"), [(1, 1.0), (3, 1.0), (3, 1.3), (10, 1.0)])
def test_every_completion_is_as_by_hand_regardless_of_the_others_in_the_batch(
    tiny, prompts, max_rows, penalty
):
    params, expected = made_by_hand(penalty)
    sampler, respond, done = Sampler(tiny, params, max_rows), asks(tiny, times=2), {}
    for i, prompt in enumerate(prompts):
        sampler.submit(i, prompt, SEEDS[i], respond)
    while not sampler.idle:
        done.update(sampler.step()[1])
    turns = []
    for i, samples in done.items():
        for seed, sample in zip(SEEDS[i], samples, strict=True):
            assert_is(sample, *expected[seed])
            turns.append(1 + len(sample.spans) // 2)
    assert turns.count(3) >= 5  # the test covers more than the case of one turn


def test_groups_with_an_environment_and_without_share_a_batch(tiny, prompts):
    params, respond = SamplingParams(60), asks(tiny)
    groups = sample_groups(tiny, prompts, SEEDS, params, responds=[respond, None, respond])
    alone = sample_groups(tiny, prompts[1:2], SEEDS[1:2], params)
    assert [sample.tokens for sample in groups[1]] == [sample.tokens for sample in alone[0]]
    assert not any(sample.spans for sample in groups[1])
    assert any(sample.spans for sample in groups[0] + groups[2])


def test_inserted_tokens_are_those_of_the_reply_between_a_stop_token_and_a_turn(tiny, prompts):
    respond = asks(tiny)
    [samples] = sample_groups(tiny, prompts[:1], SEEDS[:1], SamplingParams(120), responds=[respond])
    for sample in samples:
        start, stop = sample.spans
        assert sample.tokens[start:stop] == ids(tiny, "<|user|>And 5 more?<|end|><|assistant|>")
        assert sample.tokens[start - 1] in tiny.stop_tokens
        assert sample.logprobs[start:stop] == [0.0] * (stop - start)
        assert len(sample.tokens) == len(sample.logprobs) == len(sample.versions)
        assert sample.sampled == len(sample.tokens) - (stop - start)
        assert sample.turn == sample.tokens[stop:]


def test_a_reply_that_leaves_no_token_for_an_answer_is_left_out_and_the_completion_counts_as_cut(
    tiny, prompts
):
    [[whole]] = sample_groups(tiny, prompts[:1], [[1]], SamplingParams(60))
    length, reply = len(whole.tokens), asks(tiny)
    assert whole.finished
    size = len(reply(whole))
    for more, fits in ((size, False), (size + 1, True)):
        params = SamplingParams(length + more)
        [[sample]] = sample_groups(tiny, prompts[:1], [[1]], params, responds=[reply])
        assert sample.spans == ([length, length + size] if fits else [])
        assert len(sample.tokens) == (length + more if fits else length)
        assert not sample.finished


def test_a_stop_string_ends_its_own_turn_and_not_the_next_one(tiny, prompts):
    # When the next turn has only one token, the string is still among the last tokens: it must not be found again.
    params = SamplingParams(80, stop=("</reasoning>",))
    reply = ids(tiny, "<|end|><|user|>?<|end|><|assistant|>")
    respond = lambda sample: reply if not sample.spans else None  # noqa: E731
    [samples] = sample_groups(tiny, prompts[:1], [list(range(12))], params, responds=[respond])
    first_turns = [sample.tokens[: sample.spans[0]] for sample in samples if sample.spans]
    ended = [turn for turn in first_turns if tiny.decode(turn).endswith("</reasoning>")]
    assert len(ended) >= 6
    for sample in samples:
        if sample.spans:
            assert len(sample.turn) > 1
            assert tiny.decode(sample.turn).count("</reasoning>") <= 1


@pytest.mark.gpu
def test_new_weights_may_come_between_and_within_turns(tiny, prompts):
    respond, params = asks(tiny), SamplingParams(100)
    sampler = Sampler(tiny, params, max_rows=2, version=0)
    same = {name: array + 0 for name, array in tiny.trainable().items()}
    sampler.submit(0, prompts[0], [1, 2], respond)
    done, steps = {}, 0
    while not sampler.idle:
        if steps % 7 == 3:  # within a turn, and within an environment span
            sampler.adopt(steps // 7 + 1, same)
        done.update(sampler.step()[1])
        steps += 1
    sampler.close()
    for seed, sample in zip([1, 2], done[0], strict=True):
        assert_is(sample, *by_hand(tiny, prompts[0], seed, params, respond))
        assert sample.versions == sorted(sample.versions)
        assert len(set(sample.versions)) > 3


def test_a_model_that_is_not_batched_continuously_is_refused_with_the_setting():
    policy = random_policy("mamba")
    with pytest.raises(ConfigError, match=r"^data\.environment: must be empty for "):
        sample_groups(policy, [[1, 2]], [[1]], SamplingParams(4), responds=[lambda _: None])


# --- templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "system"])
def test_the_ids_of_a_reply_are_those_that_the_template_puts_between_two_turns(tiny, role):
    reply = {"role": role, "content": "84"}
    after = ids(tiny, f"<|{role}|>84<|end|><|assistant|>")
    assert encode_reply(tiny, reply, after_stop_token=True) == after
    [end] = tiny.stop_tokens
    assert encode_reply(tiny, reply, after_stop_token=False) == [end, *after]


def test_text_that_a_template_writes_after_the_stop_token_is_inserted_too(tiny):
    tiny.tokenizer.chat_template = CHATML
    inserted = encode_reply(tiny, {"role": "user", "content": " 84 "}, after_stop_token=True)
    assert inserted == ids(tiny, "\n<|user|>\n84<|end|>\n<|assistant|>\n")


def test_prompt_turn_and_reply_are_the_ids_of_the_whole_conversation(tiny):
    tiny.tokenizer.chat_template = CHATML
    question, reply = {"role": "user", "content": "7 * 12?"}, {"role": "user", "content": "84"}
    said = ids(tiny, "<reasoning>7*12") + list(tiny.stop_tokens)
    joined = tiny.chat.encode([question]) + said + encode_reply(tiny, reply, after_stop_token=True)
    assert joined == tiny.chat.encode([question, {"role": "assistant", "content": "<reasoning>7*12"}, reply])


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (None, "no chat template"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "does not end an assistant's turn",
        ),
        ("{% for m in messages %}{{ m['role'] }}<|end|>{% endfor %}", "does not end an assistant's turn"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses a turn of role 'user' after the assistant's",
        ),
    ],
)
def test_a_template_without_a_recognisable_end_of_turn_is_refused(tiny, template, rule):
    tiny.tokenizer.chat_template = template
    tiny.tokenizer.has_chat_template = template is not None
    with pytest.raises(ModelError, match=rule):
        encode_reply(tiny, {"role": "user", "content": "84"}, after_stop_token=True)
