"""The group filter: a group's signal under the run's advantage, and its share of right completions."""

from dataclasses import replace

import pytest
from thinking_model import write_thinking_model

from grpo_actors.config import Config, ModelConfig
from grpo_actors.learner.exchange_setup import build_selection, build_supply
from grpo_actors.learner.group_filter import group_filter, has_signal
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.policy.model import load_policy
from grpo_actors.schedule.group_criteria import FilterResult
from grpo_actors.tasks.arithmetic import Arithmetic
from grpo_actors.tasks.task import Problem

#: Texts by the token that stands for them here.
TEXTS = {7: "<answer>46</answer>", 8: "<answer>5</answer>", 9: ""}
RIGHT, WRONG, EMPTY = TEXTS


def decode(tokens) -> str:
    [token] = tokens
    return TEXTS[token]


def config(weights=None, **sections) -> Config:
    rollout = {"max_new_tokens": 8}
    return Config.model_validate(
        {"reward": {"functions": weights or {"r": 1.0}}, "rollout": rollout} | sections
    )


def group(*rewards, turns=None, lengths=None, finished=True) -> SampledGroup:
    """Make a group with one completion for each reward, or mapping of rewards."""
    completions = [
        SampledCompletion(
            tokens=turns[i] if turns else [1] * (lengths[i] if lengths else 2),
            logprobs=[],
            versions=[],
            finished=finished if isinstance(finished, bool) else finished[i],
            rewards=given if isinstance(given, dict) else {"r": given},
            inserted=[1, 2] if turns and len(turns[i]) > 1 else [],
        )
        for i, given in enumerate(rewards)
    ]
    return SampledGroup(0, 0, Problem("p", (), "46"), [1], "w", completions)


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ([1.0, 0.0], True),
        ([1.0, 1.0], False),
        ([None, None], False),
        ([1.0, None], False),
        ([0.1, 0.1], False),
    ],
)
def test_a_group_has_a_signal_if_its_valid_rewards_differ(rewards, signal):
    assert has_signal(group(*rewards), config()) is signal


def test_a_weighted_sum_counts_unless_each_function_is_normalised_by_itself():
    # 1 · 1 + 2 · 0 = 1 · 0 + 2 · 0.5, but only a third completion makes the normalised sums differ:
    # a: 1, 0, 0 and b: 0, 0.5, 0.5 centred and divided are opposite, weighted by 1 and 2 they do not cancel.
    sampled = group({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 0.5})
    weights = {"a": 1.0, "b": 2.0}
    assert not has_signal(sampled, config(weights))
    assert has_signal(sampled, config(weights, objective={"advantage": "gdpo"}))


def test_the_overlong_penalty_is_a_signal():
    # L_max = 8, L_c = 4: lengths 4 and 6 are worth 0 and -1/2.
    sampled = group(1.0, 1.0, lengths=[4, 6])
    assert not has_signal(sampled, config())
    assert has_signal(sampled, config(objective={"overlong_tokens": 4}))


def test_an_advantage_that_is_masked_is_no_signal():
    sampled = group(1.0, 0.0, finished=False)
    assert has_signal(sampled, config())
    assert not has_signal(sampled, config(objective={"mask_truncated": True}))
    one_whole = group(1.0, 0.0, finished=[True, False])
    assert has_signal(one_whole, config(objective={"mask_truncated": True}))


def text_of(_, completion):
    return decode(completion.last_turn)


def test_success_is_the_share_of_completions_that_the_task_calls_right():
    filter_group = group_filter(config(selection={"min_success": 0.3}), Arithmetic(0, 6, 6), text_of)
    assert filter_group is not None
    sampled = group(1.0, 0.0, 0.0, 0.0, turns=[[RIGHT], [WRONG], [WRONG], [EMPTY]])
    assert filter_group(sampled) == FilterResult(0.25, "too_hard")
    assert filter_group(group(1.0, 0.0, turns=[[RIGHT], [WRONG]])) == FilterResult(0.5)


def test_the_last_turn_is_judged():
    filter_group = group_filter(config(selection={"curriculum": True}), Arithmetic(0, 6, 6), text_of)
    sampled = group(1.0, 0.0, turns=[[WRONG, EMPTY, RIGHT], [RIGHT, EMPTY, WRONG]])
    assert filter_group(sampled).success == 0.5
    assert filter_group(group(1.0, turns=[[WRONG, EMPTY, RIGHT]])).success == 1.0


def test_no_group_is_filtered_where_nothing_is_selected():
    assert group_filter(config(), Arithmetic(0, 6, 6), text_of) is None
    assert group_filter(config(selection={"curriculum": True}), Arithmetic(0, 6, 6), text_of) is not None


@pytest.mark.parametrize(("grade", "success"), [("after_think", 0.5), ("all", 1.0)])
def test_success_is_judged_by_what_follows_the_thinking_unless_all_of_it_counts(tmp_path, grade, success):
    folder = write_thinking_model(tmp_path / "model")
    policy = load_policy(ModelConfig(model_name=str(folder), dtype="float32"), seed=0)
    settings = config(selection={"curriculum": True}, reward={"functions": {"r": 1.0}, "grade": grade})
    task = Arithmetic(0, 6, 6)
    selection = build_selection(settings, task, build_supply(settings, task, policy), policy, {})
    # Both write the right answer; the second one's thinking ends after it.
    texts = ["5?</think><answer>46</answer>", "<answer>46</answer></think>"]
    [opening] = policy.tokenizer.encode("<think>")
    sampled = group(1.0, 0.0)
    completions = [
        replace(c, tokens=policy.tokenizer.encode(text))
        for c, text in zip(sampled.completions, texts, strict=True)
    ]
    judged = replace(sampled, prompt=[*sampled.prompt, opening], completions=completions)
    assert selection.group_filter(judged).success == success
