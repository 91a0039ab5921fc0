"""Encoding of prompts, and the limits of their length."""

import pytest

from grpo_actors.errors import DataError, ModelError
from grpo_actors.generate.generator import Generator
from grpo_actors.policy.decoding.sampling import Sample, SamplingParams

CHAT = ({"role": "user", "content": "1 + 1"},)


def test_a_raw_text_is_its_tokens_and_a_chat_is_in_its_template(tiny):
    generator = Generator(tiny, SamplingParams(10), seed=0)
    assert tiny.tokenizer.decode(generator.encode("1 + 1")) == "1 + 1"
    assert tiny.tokenizer.decode(generator.encode(CHAT)) == "<|user|>1 + 1<|end|><|assistant|>"


def test_a_model_without_a_chat_template_can_still_continue_a_text(tiny):
    tiny.tokenizer.has_chat_template = False
    generator = Generator(tiny, SamplingParams(10), seed=0)
    assert generator.encode("1 + 1")
    for ask in (generator.require_chat_template, lambda: generator.encode(CHAT)):
        with pytest.raises(ModelError, match="no chat template; give a PROMPT and --raw"):
            ask()


def test_prompt_and_answer_share_the_context(tiny):
    # The embedded model was made for 1024 tokens: 1000 + 24 are as many, one more is one too many.
    generator = Generator(tiny, SamplingParams(24), seed=0)
    assert (generator.context, generator.excess(1000), generator.excess(1001)) == (1024, 0, 1)
    assert Generator(tiny, SamplingParams(24), seed=0, max_context=100).excess(100) == 24
    del tiny.architecture["max_position_embeddings"]
    unbounded = Generator(tiny, SamplingParams(24), seed=0)
    assert (unbounded.context, unbounded.excess(10**6)) == (None, 0)


def test_a_prompt_that_leaves_no_space_for_an_answer_is_rejected(tiny):
    tokens = len(tiny.chat.encode(CHAT))
    params = SamplingParams(24)
    assert len(Generator(tiny, params, 0, max_context=tokens + 24).encode_fitting(CHAT, "here")) == tokens
    with pytest.raises(
        DataError, match=rf"here: prompt and answer may have {tokens + 23} tokens, got {tokens} "
    ):
        Generator(tiny, params, 0, max_context=tokens + 23).encode_fitting(CHAT, "here")


def test_seeds_depend_only_on_seed_prompt_and_sample(tiny):
    seeds = [Generator(tiny, SamplingParams(24), seed).seeds(index, 3) for seed in (0, 1) for index in (0, 1)]
    assert len({draw for group in seeds for draw in group}) == 12
    assert Generator(tiny, SamplingParams(7), 0).seeds(0, 2) == seeds[0][:2]


def test_a_record_tells_how_a_completion_ended_and_how_long_it_is(tiny):
    generator = Generator(tiny, SamplingParams(10), seed=0)
    tokens = tiny.tokenizer.encode("46", add_special_tokens=False)
    cut = {"index": 3, "sample": 1, "completion": "46", "finish_reason": "length"}
    assert generator.record(3, 1, 7, Sample(tokens)) == cut | {
        "prompt_tokens": 7,
        "completion_tokens": len(tokens),
    }
    ended = generator.record(3, 1, 7, Sample([*tokens, min(tiny.stop_tokens)], finished=True))
    assert ended == cut | {
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": len(tokens) + 1,
    }


def test_an_answer_ends_as_soon_as_it_is_told_to(tiny):
    generator, said = Generator(tiny, SamplingParams(60), seed=0), []
    sample = generator.answer(generator.encode("1 + 1"), 0, said.append, stop=lambda: len(said) == 3)
    assert len(sample.tokens) == 3
    assert not sample.finished
    assert "".join(said) == tiny.decode(sample.tokens)


def test_a_text_without_tokens_is_refused(tiny):
    with pytest.raises(DataError, match="a prompt must have a token, got ''"):
        Generator(tiny, SamplingParams(10), seed=0).encode("")
