"""The verdict of a trial on handmade figures: each fault is named with its cure, and blocks only where a run would be lost."""

import pytest

from grpo_actors.config import Config, RewardConfig, RolloutConfig
from grpo_actors.observe.symptoms import NO_END
from grpo_actors.trial.verdict import Facts, Finding, Prompts, findings

CONFIG = Config(reward=RewardConfig(functions={"correctness": 1.0, "strict_format": 0.5}))
#: Metrics of an update without any symptom.
WELL = {
    "completions": 8,
    "reward_mean": 0.6,
    "reward_std": 0.4,
    "rewards": {"correctness": 0.5, "strict_format": 0.2},
    "reward_failures": {},
    "zero_variance_share": 0.25,
    "grad_norm": 0.3,
    "ratio_mean": 1.0,
    "logprob_gap_mean": 0.01,
    "entropy": 0.2,
    "completion_length_mean": 20.0,
    "truncated_share": 0.02,
    "skipped_steps": 0,
}


def found(metrics=(), **facts):
    given = {"config": CONFIG, "prompts": Prompts([10, 12], limit=20), "failures": {}, "ends_turns": True}
    given |= {"sampling_s": 2.0, "rewards_s": 0.5, "cut": False, "notes": []}
    return findings(Facts(metrics=WELL | dict(metrics), **given | facts))


def test_a_trial_without_a_fault_finds_nothing():
    assert found() == []


def test_a_chat_template_without_an_end_of_turn_blocks_unless_a_text_stops_completions():
    assert found(ends_turns=False) == [Finding("end of turn", NO_END, blocks=True)]
    assert found(ends_turns=False, config=Config(rollout=RolloutConfig(stop=["\n"]))) == []


def test_sentences_on_the_model_are_notes():
    assert found(notes=["it is slow"]) == [Finding("model", "it is slow", blocks=False)]


@pytest.mark.parametrize(
    ("too_long", "is_told", "blocks"), [(0, False, None), (1, True, False), (2, True, True)]
)
def test_prompts_over_the_limit_block_from_more_than_a_tenth_on(too_long, is_told, blocks):
    lengths = [20] * (10 - too_long) + [30, 29][:too_long]
    told = found(prompts=Prompts(lengths, limit=20))
    assert bool(told) == is_told
    for finding in told:
        assert (finding.name, finding.blocks) == ("prompt too long", blocks)
        assert finding.text == (
            f"{10 * too_long} % of 10 prompts have more than 20 tokens (data.max_prompt_length) and are left out; "
            "the longest has 30"
        )


def test_a_failure_is_told_by_its_first_and_its_last_line_with_the_number_of_completions():
    error = "it raised\nTraceback (most recent call last):\n  KeyError: 'gold'\n"
    failures = {"mine.py:right": error, "environment": "no reply"}
    assert found({"reward_failures": {"mine.py:right": 3}}, failures=failures) == [
        Finding("mine.py:right fails", "it raised (KeyError: 'gold') for 3 of 8 completions"),
        Finding("environment fails", "no reply"),
    ]


@pytest.mark.parametrize(
    ("metrics", "name", "is_judged_when_cut"),
    [
        ({"reward_mean": 0.0, "reward_std": 0.0}, "reward is zero", False),
        ({"zero_variance_share": 1.0}, "no variance", False),
        ({"grad_norm": 0.0}, "gradient is zero", True),
        ({"logprob_gap_mean": 0.2}, "workers disagree", True),
        ({"entropy": 1e-4}, "entropy collapses", True),
        ({"truncated_share": 0.9}, "truncated", False),
        ({"invalid_completions": 4}, "no reward", True),
        ({"skipped_steps": 1}, "gradient is not finite", True),
    ],
)
def test_one_update_shows_a_symptom_and_completions_that_the_trial_cut_say_nothing_of_answers(
    metrics, name, is_judged_when_cut
):
    assert [(finding.name, finding.blocks) for finding in found(metrics)] == [(name, True)]
    judged = [finding.name for finding in found(metrics, cut=True)]
    assert judged == [*([name] if is_judged_when_cut else []), "sampling is slow"]


def test_a_reward_that_alone_is_0_is_a_note():
    silent = {"rewards": {"correctness": 0.5, "strict_format": 0.0}}
    text = "for all 8 completions: as long as it stays so, it teaches nothing"
    assert found(silent) == [Finding("strict_format is 0", text, blocks=False)]
    assert [finding.name for finding in found(silent, cut=True)] == ["sampling is slow"]


def test_without_any_reward_no_single_one_is_named():
    nothing = {"reward_mean": 0.0, "reward_std": 0.0, "rewards": {"correctness": 0.0, "strict_format": 0.0}}
    assert [finding.name for finding in found(nothing)] == ["reward is zero"]


@pytest.mark.parametrize(
    ("sampling_s", "rewards_s", "is_slow"),
    [(2.0, 2.1, True), (2.0, 1.9, False), (0.1, 0.9, False), (0.1, 1.1, True)],
)
def test_rewards_that_take_longer_than_sampling_and_than_a_second_are_a_note(sampling_s, rewards_s, is_slow):
    told = found(sampling_s=sampling_s, rewards_s=rewards_s)
    assert [(finding.name, finding.blocks) for finding in told] == [("rewards are slow", False)] * is_slow


def test_a_trial_that_ends_no_group_blocks_and_says_nothing_of_the_rewards_time():
    assert [(each.name, each.blocks) for each in found(cut=True, rewards_s=9.0)] == [
        ("sampling is slow", True)
    ]
