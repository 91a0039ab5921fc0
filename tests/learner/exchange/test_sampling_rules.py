"""The rules that every completion follows: what a real sampler makes passes, what nobody can have sampled is refused."""

from dataclasses import replace

import pytest

from grpo_actors.config import Config
from grpo_actors.errors import ProtocolError
from grpo_actors.learner.exchange.sampling_rules import SamplingRules
from grpo_actors.learner.exchange_setup import build_sampling_rules
from grpo_actors.learner.groups import SampledCompletion
from grpo_actors.policy.decoding.sampling import sample_groups
from grpo_actors.rollout.worker import sampling_params

STOP, END = 1, 2  # a stop token, and the token that completes a stop string
RULES = SamplingRules(
    vocabulary=100,
    max_new_tokens=6,
    max_turns=2,
    stop_tokens=frozenset({STOP}),
    ends=lambda turn: turn[-1] in (STOP, END),
    closing=(),
    rewards=frozenset({"r"}),
)


def completion(tokens, *, finished=True, inserted=(), **changes) -> SampledCompletion:
    fields = {"logprobs": [-0.5] * len(tokens), "versions": [3] * len(tokens), "rewards": {"r": 1.0}}
    return SampledCompletion(tokens=tokens, finished=finished, inserted=list(inserted), **fields | changes)


@pytest.mark.parametrize(
    "sampled",
    [
        completion([5, STOP]),
        completion([STOP]),
        completion([5, END]),
        completion([END, 5, STOP]),  # a token that completes a stop string here may be any token elsewhere
        completion([5, 6, 7, 8, 9, STOP]),
        completion([5, 6, 7, 8, 9, 10], finished=False),
        completion([0, 99, STOP]),
        completion([5, STOP, STOP, 7, 8, STOP], inserted=[2, 4]),  # an environment may insert stop tokens
        completion([5, STOP, 7, 8, 9, 10], inserted=[2, 4], finished=False),
        completion([5, 6, 7, STOP], finished=False),  # the environment's reply did not fit in
        completion([5, STOP], versions=[2, 3]),
        completion([5, STOP], logprobs=[0.0, -900.0]),
        completion([5, STOP], logprobs=[1e-3, -0.0]),  # rounding
        completion([5, STOP], logprobs=[-1000.0, 0.01]),
    ],
)
def test_what_a_sampler_makes_passes(sampled):
    RULES.check(sampled, newest_version=3)


@pytest.mark.parametrize(
    ("sampled", "complaint"),
    [
        (completion([5, 100]), "token ids lie in 0 … 99, got 5 … 100"),
        (completion([-1, STOP]), "token ids lie in 0 … 99, got -1 … 1"),
        (completion([5] * 7, finished=False), "a completion has at most 6 tokens, got 7"),
        (completion([5, STOP], logprobs=[0.02, -1.0]), "log-probs lie in -1000 … 0.01, got -1 … 0.02"),
        (completion([5, STOP], logprobs=[-1e30, -1.0]), "log-probs lie in -1000 … 0.01, got -1e"),
        (completion([5, STOP], versions=[3, 4]), "version 3 is the newest, got 3 … 4"),
        (completion([5, STOP], versions=[-1, 3]), "version 3 is the newest, got -1 … 3"),
        (completion([5, STOP], versions=[3, 2]), "the versions of a completion's tokens never fall"),
        (completion([5, 6]), "a finished completion ends with a stop token or string"),
        (completion([5, 6, 7, 8, 9, 10]), "a finished completion ends with a stop token or string"),
        (completion([5, 6], finished=False), "a completion without an end has 6 tokens"),
        (completion([5, STOP, 6, STOP]), "a turn ends with its first stop token"),
        (completion([5, STOP, STOP]), "a turn ends with its first stop token"),
        (completion([5, 7, 8, STOP], inserted=[1, 2]), "an environment replies at the end of a turn"),
        (
            completion([STOP, 7, STOP, 7, STOP], inserted=[1, 2, 3, 4]),
            "a completion has at most 2 turns, got 3",
        ),
        (
            completion([STOP, 7, 8, STOP], inserted=[1, 2], finished=False),
            "a completion that ends with a stop token or string is finished",
        ),
        (completion([5, STOP], rewards={"s": 1.0}), "the rewards are r, got s"),
    ],
)
def test_what_no_sampler_makes_is_refused(sampled, complaint):
    with pytest.raises(ProtocolError) as caught:
        RULES.check(sampled, newest_version=3)
    assert complaint in str(caught.value)


def test_without_an_environment_a_completion_that_ends_is_finished():
    rules = replace(RULES, max_turns=1)
    rules.check(completion([5, STOP]), 3)
    with pytest.raises(ProtocolError, match="is finished"):
        rules.check(completion([5, STOP], finished=False), 3)


BOUNDED = replace(RULES, closing=(8, 9), max_new_tokens=8)


@pytest.mark.parametrize(
    "sampled",
    [
        completion([5, 8, 9, 5, STOP], forced=[1, 3]),
        completion([5, STOP, 7, 5, 8, 9, 5, 5], forced=[4, 6], inserted=[2, 3], finished=False),
        completion([5, 8, 9, STOP, 7, 5, 8, 9], forced=[1, 3, 6, 8], inserted=[4, 5], finished=False),
        completion([5, 8, 9, STOP]),  # the policy may write the tag itself
        completion([5, 8, 9, 5, STOP], forced=[2, 3]),  # or its first tokens
    ],
)
def test_a_closing_tag_may_be_inserted_where_thinking_is_bounded(sampled):
    BOUNDED.check(sampled, 3)


@pytest.mark.parametrize(
    ("rules", "sampled", "reason"),
    [
        (RULES, completion([5, 8, 9, STOP], forced=[1, 3]), "only the closing tag"),
        (BOUNDED, completion([5, 8, 7, STOP], forced=[1, 3]), "only the closing tag"),
        (BOUNDED, completion([5, 8, 9, STOP], forced=[1, 2]), "only the closing tag"),
        (BOUNDED, completion([5, 8, 9, STOP], forced=[0, 3]), "only the closing tag"),
        (BOUNDED, completion([5, 8, 9, STOP], forced=[3, 3]), "only the closing tag"),
        (BOUNDED, completion([9, STOP], forced=[0, 1]), "only the closing tag"),
        (BOUNDED, completion([STOP, 8, 9, 5, STOP], inserted=[1, 2], forced=[2, 3]), "within a turn"),
        # Thinking has a token before it is ended.
        (BOUNDED, completion([STOP, 7, 8, 9, 5, STOP], inserted=[1, 2], forced=[2, 4]), "within a turn"),
        (BOUNDED, completion([STOP, 8, 9, 7, 5, STOP], inserted=[1, 4], forced=[1, 3]), "within a turn"),
    ],
)
def test_nothing_but_the_closing_tag_counts_as_inserted(rules, sampled, reason):
    with pytest.raises(ProtocolError, match=reason):
        rules.check(sampled, 3)


@pytest.mark.parametrize("stop", [(), ("1", "e")], ids=["stop tokens", "stop strings"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_completions_of_the_embedded_model_pass(tiny, stop, temperature):
    config = Config.model_validate(
        {"rollout": {"max_new_tokens": 24, "stop": stop, "temperature": temperature}}
        | {"reward": {"functions": {"r": 1.0}}}
    )
    rules = build_sampling_rules(config, tiny)
    prompts = [tiny.chat.encode([{"role": "user", "content": f"What is {n} + 3?"}]) for n in range(4)]
    groups = sample_groups(
        tiny, prompts, [range(8 * n, 8 * n + 8) for n in range(4)], sampling_params(config)
    )
    ends = set()
    for sample in (sample for group in groups for sample in group):
        made = completion(sample.tokens, finished=sample.finished, logprobs=sample.logprobs)
        rules.check(replace(made, versions=sample.versions), 0)
        ends.add(sample.finished)
    assert True in ends


def test_a_policy_knows_how_many_ids_it_predicts(tiny):
    assert tiny.vocabulary == 320  # rows of the embedding, in assets/tiny/config.json
