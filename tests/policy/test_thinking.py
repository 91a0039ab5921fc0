"""Thinking: the tags of a model, the parts of a turn, prompts with the template's own defaults, and the bound on tokens."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from thinking_model import write_thinking_model

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ConfigError
from grpo_actors.policy.decoding.rows import require_bound
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.thinking import TAGS, Budget, Parts, Tags, Thinking, thinking_of

THINK = Thinking(Tags("<think>", "</think>"), start=(1,), end=(2,), closing=(2,))
CHAT = [{"role": "user", "content": "1+1?"}]


@pytest.fixture
def thinks(tmp_path):
    """The embedded model as one that thinks."""
    folder = write_thinking_model(tmp_path / "thinks")
    return load_policy(ModelConfig(model_name=str(folder), dtype="float32"), seed=0)


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("42", False, Parts(None, "42")),
        ("<think> 6 · 7 </think>42", False, Parts("6 · 7", "42")),
        (" 6 · 7</think>42", True, Parts("6 · 7", "42")),
        ("a</think>b<think>c</think>d", True, Parts("c", "d")),
        ("<think></think>42", False, Parts("", "42")),
        ("<think> still thinking, 41?", False, Parts(None, "")),
        ("still thinking, 41?", True, Parts(None, "")),
    ],
)
def test_a_turn_is_divided_at_its_last_closing_tag(text, opened, parts):
    assert THINK.divide(text, opened=opened) == parts


@pytest.mark.parametrize(
    ("turn", "opened", "length"),
    [
        ([7, 8], False, 0),
        ([1, 7, 8, 2, 9], False, 2),
        ([7, 8, 2, 9], True, 2),
        ([1, 7, 2, 9, 1, 7, 7], False, 3),
        ([], True, 0),
    ],
)
def test_the_length_of_thinking_is_that_between_the_tags(turn, opened, length):
    assert THINK.length(turn, opened=opened) == length


@pytest.mark.parametrize(
    ("turn", "opened", "spent_after"),
    [
        ([7, 7, 7], True, 3),
        ([9, 1, 7, 7, 7], False, 5),
        ([9, 9, 9, 9, 9], False, None),
        ([1, 7, 2, 9, 1, 7, 7], False, 7),  # 1 token, then 2 more
        ([1, 7, 7, 2, 9, 9], False, None),
    ],
)
def test_a_budget_is_spent_after_so_many_tokens_between_the_tags(turn, opened, spent_after):
    budget = Budget(THINK, 3, opened=opened)
    spent = [n for n in range(1, len(turn) + 1) if budget.is_spent(turn[:n])]
    assert spent == ([] if spent_after is None else [spent_after])


#: Tags of two tokens each.
LONG = Thinking(Tags("ab", "cd"), start=(1, 2), end=(3, 4), closing=(3, 4))


@pytest.mark.parametrize(
    ("turn", "opened", "length"),
    [
        ([9, 1, 2, 7, 7, 3, 4, 8], False, 2),
        ([1, 9, 1, 2, 7], False, 1),  # the first 1 begins no tag
        ([7, 3, 4], True, 1),
        ([7, 3, 9, 4], True, 4),  # nothing ends it
        ([1, 2, 3, 4], False, 0),
        ([7, 1], False, 0),
    ],
)
def test_tags_of_several_tokens_are_found_whole(turn, opened, length):
    assert LONG.length(turn, opened=opened) == length


def test_a_budget_knows_tags_of_several_tokens():
    budget = Budget(LONG, 2, opened=False)
    # The first token of the closing tag counts, because it might begin none. Nothing is left when thinking begins again.
    turn = [9, 1, 2, 7, 3, 4, 9, 9, 1, 2, 7]
    assert [n for n in range(1, len(turn) + 1) if budget.is_spent(turn[:n])] == [5, 10, 11]


@pytest.mark.parametrize(
    ("turn", "missing"),
    [
        ([], [3, 4, 3, 5]),
        ([7], [3, 4, 3, 5]),
        ([7, 3], [4, 3, 5]),
        ([7, 3, 4, 3], [5]),
        ([3, 4, 7, 4], [3, 4, 3, 5]),
    ],
)
def test_what_a_model_has_begun_of_the_closing_tag_is_not_inserted_again(turn, missing):
    # As that of gpt-oss, the tag begins earlier than what ends the thinking.
    thinking = Thinking(LONG.tags, (1, 2), end=(3, 5), closing=(3, 4, 3, 5))
    assert list(Budget(thinking, 2, opened=True).missing(turn)) == missing


def test_a_bound_must_leave_tokens_for_the_closing_tag_and_an_answer(thinks, tiny):
    require_bound(tiny, 0, 1, "rollout.think_tokens")  # no bound
    require_bound(thinks, 3, 5, "rollout.think_tokens")
    with pytest.raises(
        ConfigError, match=r"^rollout\.think_tokens: must be less than the 4 tokens .* minus the 1 .* got 3$"
    ):
        require_bound(thinks, 3, 4, "rollout.think_tokens")
    thinks.stop_tokens = frozenset(thinks.thinking.closing)  # the tag would end the completion
    with pytest.raises(ConfigError, match=r"must be 0 for .* no tag that ends thinking, got 3"):
        require_bound(thinks, 3, 5, "rollout.think_tokens")


@pytest.mark.parametrize("tags", TAGS, ids=lambda tags: tags.start)
def test_each_familys_tags_are_found_by_its_tokens(tags):
    words = [*(tags.marks or (tags.start, tags.end)), "thought", "analysis", "final", "assistant"]
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}

    def encode(text, *, add_special_tokens):
        assert not add_special_tokens
        found = []
        while text:
            word = next(word for word in sorted(ids, key=len, reverse=True) if text.startswith(word))
            found.append(ids[word])
            text = text.removeprefix(word)
        return found

    thinking = thinking_of(SimpleNamespace(get_vocab=lambda: ids, encode=encode))
    assert thinking.tags == tags
    turn = [*thinking.start, 99, 98, *thinking.closing, 97]
    extra = len(thinking.closing) - len(thinking.end)  # gpt-oss ends a message before the final one begins
    assert thinking.length(turn, opened=False) == 2 + extra


def test_a_vocabulary_without_tags_divides_texts_only(tiny):
    assert tiny.thinking == Thinking(TAGS[0])
    assert tiny.thinking.divide("<think>1</think>2", opened=False) == Parts("1", "2")


def rendered(policy, **settings):
    policy.chat.settings = settings
    return policy.tokenizer.decode(policy.chat.encode(CHAT))


def test_a_prompt_has_the_templates_own_defaults_unless_a_setting_says_otherwise(thinks):
    assert thinks.tokenizer.has_thinking  # so that mlx-lm's wrapper would pass enable_thinking = true
    start = "<|user|>1+1?<|end|><|assistant|>"
    assert rendered(thinks) == rendered(thinks, enable_thinking=True) == start
    assert rendered(thinks, enable_thinking=False) == f"{start}<think>\n\n</think>\n\n"
    assert rendered(thinks, opens=True) == f"{start}<think>\n"


def test_a_reply_of_an_environment_is_rendered_with_the_same_settings(thinks):
    thinks.chat.settings = {"opens": True}
    reply = encode_reply(thinks, {"role": "user", "content": "5"}, after_stop_token=True)
    assert thinks.tokenizer.decode(reply) == "<|user|>5<|end|><|assistant|><think>\n"
    assert thinks.begins_thinking(reply)


def test_a_turn_begins_within_thinking_only_if_its_prompt_ends_with_the_opening_tag(thinks):
    for settings, begins in (({}, False), ({"enable_thinking": False}, False), ({"opens": True}, True)):
        thinks.chat.settings = settings
        assert thinks.begins_thinking(thinks.chat.encode(CHAT)) is begins
    asked = [{"role": "user", "content": "Begin with <think>"}]
    thinks.chat.settings = {}
    assert not thinks.begins_thinking(thinks.chat.encode(asked))


@pytest.mark.parametrize("opens", [False, True])
def test_thinking_ends_after_its_tokens_in_every_row_of_a_batch_and_the_rest_is_sampled(thinks, opens):
    thinks.chat.settings = {"opens": True} if opens else {}
    questions = ["What is 12 + 34?", "There are 21 pears and 14 plums. How many are there in all?", "7"]
    prompts = [thinks.chat.encode([{"role": "user", "content": text}]) for text in questions]
    seeds, bound = [[1, 2, 3], [4, 5], [6]], 5
    params = SamplingParams(40, max_kv_tokens=250, think_tokens=bound)  # about three rows at a time
    groups = sample_groups(thinks, prompts, seeds, params)
    free = sample_groups(thinks, prompts, seeds, SamplingParams(40))
    [closing], forced = thinks.thinking.closing, 0
    for prompt, samples, unbound, group in zip(prompts, groups, free, seeds, strict=True):
        for sample, other, seed in zip(samples, unbound, group, strict=True):
            [[alone]] = sample_groups(thinks, [prompt], [[seed]], params)
            assert sample.tokens == alone.tokens
            assert sample.forced == alone.forced
            assert thinks.thinking.length(sample.tokens, opened=opens) <= bound
            cut = sample.forced[0] if sample.forced else len(sample.tokens)
            assert sample.tokens[:cut] == other.tokens[:cut]
            learner, _ = completion_logprobs(
                *(thinks.model, mx.array([[*prompt, *sample.tokens, 0]]), mx.array([len(prompt) - 1])),
                *(mx.array([sample.tokens]), 1.0),
            )
            inserted = np.zeros(len(sample.tokens), np.bool_)
            for start, stop in zip(sample.forced[::2], sample.forced[1::2], strict=True):
                assert sample.tokens[start:stop] == [closing]
                assert thinks.thinking.length(sample.tokens[:start], opened=opens) == bound
                inserted[start:stop] = True
                forced += 1
            expected = np.where(inserted, 0.0, np.array(learner)[0])
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            assert sample.sampled == len(sample.tokens) - inserted.sum()
    assert forced >= 3


def test_of_a_tag_that_the_model_has_begun_the_rest_is_inserted(thinks):
    thinks.chat.settings = {"opens": True}
    prompt, [end] = thinks.chat.encode(CHAT), thinks.thinking.closing
    [[free]] = sample_groups(thinks, [prompt], [[1]], SamplingParams(20))
    thinks.thinking = replace(thinks.thinking, closing=(free.tokens[4], end))
    [[sample]] = sample_groups(thinks, [prompt], [[1]], SamplingParams(20, think_tokens=5))
    assert sample.tokens[:6] == [*free.tokens[:5], end]
    assert sample.forced == [5, 6]


def test_a_tag_that_leaves_no_token_for_an_answer_is_not_inserted(thinks):
    thinks.chat.settings = {"opens": True}
    prompt = thinks.chat.encode(CHAT)
    [samples] = sample_groups(thinks, [prompt], [list(range(8))], SamplingParams(6, think_tokens=5))
    assert not any(sample.forced for sample in samples)  # 5 of thinking and the tag are 6
    [samples] = sample_groups(thinks, [prompt], [list(range(8))], SamplingParams(7, think_tokens=5))
    assert {tuple(sample.forced) for sample in samples if len(sample.tokens) == 7} >= {(5, 6)}


def test_a_model_without_tags_is_sampled_without_a_bound(tiny):
    # An evaluation compares models of several kinds with one configuration.
    prompt = tiny.chat.encode(CHAT)
    bounded, free = (
        sample_groups(tiny, [prompt], [[1, 2]], SamplingParams(20, think_tokens=bound)) for bound in (3, 0)
    )
    assert bounded == free


def test_rows_that_begin_together_are_bounded_too():
    policy = random_policy("mamba2")
    policy.thinking = Thinking(Tags("a", "b"), start=(5,), end=(6,), closing=(6,))
    seeds = list(range(12))
    [samples] = sample_groups(policy, [[1, 2, 3]], [seeds], SamplingParams(120, think_tokens=2))
    assert any(sample.forced for sample in samples)
    for sample in samples:
        # A tag that comes just before the end is left as it is.
        assert policy.thinking.length(sample.tokens[:110], opened=False) <= 2
