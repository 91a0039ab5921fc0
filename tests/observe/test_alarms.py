"""Alarms on handmade series: each rule fires at its threshold, is silent just below, and is reported once."""

import re

import pytest

from grpo_actors.config import OWNER, Config
from grpo_actors.observe.alarms import Health
from grpo_actors.observe.symptoms import CONFIRMING_UPDATES, FORMAT_REWARDS, NO_END, RULES
from grpo_actors.tasks.rewards import REWARDS

PATIENCE = 5

#: Metrics of an update in a healthy run.
WELL = {
    "reward_mean": 0.6,
    "reward_std": 0.4,
    "rewards": {"correctness": 0.5, "strict_format": 0.5},
    "zero_variance_share": 0.25,
    "grad_norm": 0.3,
    "kl": 0.02,
    "ratio_mean": 1.0,
    "ratio_max": 1.4,
    "clip_share": 0.01,
    "logprob_gap_mean": 0.01,
    "logprob_gap_max": 0.8,
    "mismatch_kl": 0.002,
    "entropy": 0.2,
    "completion_length_mean": 20.0,
    "truncated_share": 0.02,
    "staleness": {"0": 3, "1": 5},
    "learning_rate": 1e-4,
    "skipped_steps": 0,
    "update_s": 1.0,
    "learner_wait_share": 0.1,
}

NO_REWARD = {"reward_mean": 0.0, "reward_std": 0.0, "zero_variance_share": 1.0, "grad_norm": 0.0}
EQUAL_REWARDS = {"zero_variance_share": 1.0, "grad_norm": 0.0, "reward_std": 0.0}


def config(**settings) -> Config:
    sections = {"health": {"patience_updates": PATIENCE}, "reward": {"functions": {"correctness": 1.0}}}
    for leaf, value in settings.items():
        sections.setdefault(OWNER[leaf], {})[leaf] = value
    return Config.model_validate(sections)


def raised(series, **settings) -> list[tuple[int, str]]:
    """Return (number of the update, counted from 1; name of the alarm) of every alarm."""
    health = Health(config(**settings))
    return [
        (number, alarm.name)
        for number, changes in enumerate(series, 1)
        for alarm in health.check({**WELL, **changes})
    ]


def text(changes, updates=PATIENCE, **settings) -> str:
    """Return the single alarm line after `updates` such updates."""
    health = Health(config(**settings))
    (alarm,) = [alarm for _ in range(updates) for alarm in health.check({**WELL, **changes})]
    assert "\n" not in alarm.text
    return alarm.text


#: Alarm -> updates that it waits for, metrics that raise it, and metrics just below its limit. Limits are
#: the settings' defaults.
SIGNS = {
    "reward is zero": (PATIENCE, NO_REWARD, NO_REWARD | {"reward_mean": 1e-3, "reward_std": 1e-3}),
    "no variance": (PATIENCE, EQUAL_REWARDS, {"zero_variance_share": 0.99}),
    "gradient is zero": (CONFIRMING_UPDATES, {"grad_norm": 0.0}, {"grad_norm": 1e-9}),
    "KL explodes": (CONFIRMING_UPDATES, {"kl": 1.01}, {"kl": 1.0}),
    "ratio explodes": (CONFIRMING_UPDATES, {"ratio_max": 101.0}, {"ratio_max": 100.0}),
    "workers disagree": (CONFIRMING_UPDATES, {"logprob_gap_mean": 0.11}, {"logprob_gap_mean": 0.1}),
    "entropy collapses": (PATIENCE, {"entropy": 0.0049}, {"entropy": 0.005}),
    "truncated": (PATIENCE, {"truncated_share": 0.81}, {"truncated_share": 0.8}),
    "always stale": (PATIENCE, {"staleness": {"3": 8}}, {"staleness": {"2": 1, "3": 7}}),
    "learning rate is zero": (CONFIRMING_UPDATES, {"learning_rate": 0.0}, {"learning_rate": 1e-12}),
}
#: Other alarms that may fire as well: rewards just above 0 are still equal.
ALSO = {"reward is zero": {"no variance", "gradient is zero"}}


@pytest.mark.parametrize("name", SIGNS)
def test_an_alarm_is_raised_once_when_it_has_held_long_enough(name):
    updates, sick, _ = SIGNS[name]
    assert raised([sick] * 3 * updates, max_staleness=3) == [(updates, name)]
    assert raised([sick] * (updates - 1) + [{}], max_staleness=3) == []


@pytest.mark.parametrize("name", SIGNS)
def test_just_below_its_threshold_it_is_silent(name):
    updates, _, well = SIGNS[name]
    names = {alarm for _, alarm in raised([well] * 3 * updates, max_staleness=3)}
    assert names <= ALSO.get(name, set())


@pytest.mark.parametrize("name", SIGNS)
def test_it_is_raised_again_only_after_it_has_ended(name):
    updates, sick, _ = SIGNS[name]
    series = [sick] * 2 * updates + [{}] + [sick] * 2 * updates
    assert raised(series, max_staleness=3) == [(updates, name), (3 * updates + 1, name)]


UNMEASURED = dict.fromkeys(("ratio_mean", "clip_share", "logprob_gap_mean", "mismatch_kl", "entropy"))


@pytest.mark.parametrize("name", ["workers disagree", "entropy collapses"])
def test_an_update_in_which_no_token_trained_neither_ends_nor_raises_an_alarm(name):
    _, sick, _ = SIGNS[name]
    every_second = [sick, UNMEASURED] * 3 * PATIENCE
    assert [alarm for _, alarm in raised(every_second)] == [name]
    assert raised([UNMEASURED] * 3 * PATIENCE) == []
    assert raised([{}, *[UNMEASURED] * PATIENCE, sick, sick]) == [], "two updates do not confirm"


def test_every_rule_has_a_series():
    others = {"length runs away", "steps are skipped", "reward fails", "no reward"}
    assert {*SIGNS, *others} == set(RULES)


FAILED = {"completions": 64, "reward_failures": {"judge": 8}, "invalid_completions": 8}


def test_a_reward_that_fails_sometimes_is_an_alarm_with_a_count():
    well = {"completions": 64, "reward_failures": {}, "invalid_completions": 0}
    assert raised([well, FAILED, *[well] * 10, FAILED]) == [(2, "reward fails"), (13, "reward fails")]
    assert text(FAILED, updates=1).startswith("judge failed for 8 of the last 64 completions")
    # 8 of 5 · 64 completions are 2.5 %.
    allowed = [well] * 4 + [FAILED] + [well] * 5
    assert raised(allowed, max_failed_share=0.03) == []
    assert raised(allowed, max_failed_share=0.02) == [(5, "reward fails")]


def test_completions_that_no_reward_applies_to_are_an_alarm_unless_a_reward_failed():
    unscored = FAILED | {"reward_failures": {}}
    assert raised([unscored] * 3) == [(1, "no reward")]
    assert text(unscored, updates=1).startswith("8 of the last 64 completions have no value from any reward")


def test_updates_that_measured_no_completions_do_not_count():
    health = Health(config())
    assert health.check(WELL) == []
    for changes in (FAILED, FAILED | {"reward_failures": {}}):
        health = Health(config())
        health.check(WELL)
        [alarm] = health.check(WELL | changes)
        assert "8 of the last 64 completions" in alarm.text


def test_the_reward_that_fails_most_is_named():
    failed = FAILED | {"reward_failures": {"judge": 8, "other": 9}}
    assert text(failed, updates=1).startswith("other failed for 9 of")


def test_a_single_completion_without_a_value_is_an_alarm_if_none_is_allowed():
    one = FAILED | {"reward_failures": {}, "invalid_completions": 1}
    assert raised([one], max_failed_share=0.0) == [(1, "no reward")]
    assert raised([one | {"invalid_completions": 0}], max_failed_share=0.0) == []


def test_rewards_that_cancel_out_are_not_zero():
    assert raised([{"reward_mean": 0.0, "reward_std": 0.5}] * 3 * PATIENCE) == []


#: Metric -> values of five updates, and how the alarm writes the newest.
RISING = {
    "kl": ([2.0, 3.0, 4.0, 5.0, 6.0], 3, "reference is 4 nats"),
    "ratio_max": ([200.0, 300.0, 400.0], 3, "ratio is 400 "),
    "mismatch_kl": ([0.2, 0.3, 0.4], 3, "KL 0.4 "),
    "entropy": ([0.001, 0.002, 0.003, 0.004, 0.0045], 5, "entropy is 0.0045 nats"),
    "truncated_share": ([0.81, 0.82, 0.83, 0.84, 0.85], 5, "85% of the completions"),
}


@pytest.mark.parametrize("metric", RISING)
def test_an_alarm_has_the_number_of_the_newest_update(metric):
    values, updates, written = RISING[metric]
    health = Health(config())
    (alarm,) = [alarm for x in values[:updates] for alarm in health.check({**WELL, metric: x})]
    assert written in alarm.text


def test_length_is_compared_with_that_of_the_first_updates():
    # Five updates of 20 tokens, and four times that is the limit.
    grown = {"completion_length_mean": 81.0}
    name = "length runs away"
    assert raised([{}] * 5 + [grown] * 9) == [(10, name)]
    assert raised([{}] * 5 + [{"completion_length_mean": 80.0}] * 9) == []
    assert raised([{}] * 5 + [grown] * 5 + [{}] + [grown] * 5) == [(10, name), (16, name)]
    health = Health(config())
    lengths = [10, 20, 30, 20, 20, *[90] * 4, 95]
    (alarm,) = [alarm for x in lengths for alarm in health.check({**WELL, "completion_length_mean": x})]
    assert alarm.text.startswith("completions have 95 tokens, at first 20 ")


def test_skipped_steps_are_counted_within_the_window():
    # More than 3 within 5 updates: 0, 1, 2, 3, then the fourth; one in every second update is never too many.
    name = "steps are skipped"
    assert raised([{"skipped_steps": n} for n in (0, 1, 2, 3, 4, 5)]) == [(5, name)]
    assert raised([{"skipped_steps": n // 2} for n in range(40)]) == []
    counts = [0, 4, *[4] * 6, 8]
    assert raised([{"skipped_steps": n} for n in counts]) == [(2, name), (9, name)]
    # One update is one step back, not two and not none.
    assert raised([{"skipped_steps": n} for n in (0, 2, 4, 6)], patience_updates=1) == []
    assert raised([{"skipped_steps": n} for n in (0, 4)], patience_updates=1) == [(2, name)]
    health = Health(config())
    (alarm,) = [alarm for n in (0, 2, 5) for alarm in health.check({**WELL, "skipped_steps": n})]
    assert alarm.text.startswith("5 steps within 2 updates had no finite gradient")
    # A resumed run continues its count.
    assert raised([{"skipped_steps": 100}] * 8) == []


def test_a_run_that_learns_raises_nothing():
    assert raised([{}] * 100) == []


def test_metrics_that_were_not_measured_raise_nothing():
    health = Health(config())
    assert [health.check({"update": n}) for n in range(30)] == [[]] * 30


def test_a_short_patience_does_not_silence_the_others():
    assert raised([{"kl": 5.0}] * 5, patience_updates=1) == [(CONFIRMING_UPDATES, "KL explodes")]


def test_the_memory_is_bounded():
    health = Health(config())
    for _ in range(1000):
        health.check(WELL)
    assert len(health._rule_input.updates) == PATIENCE + 1
    assert len(health._rule_input.first_lengths) == PATIENCE


# --- the likely cause -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"reward_mean": None, "reward_std": None}, "no completion has a valid reward"),
        ({"truncated_share": 0.93}, "93% of the completions are cut before an answer"),
        ({"truncated_share": 0.93}, "rollout.max_new_tokens (now 256)"),
        ({"completion_length_mean": 1.0}, "the completions are empty (1 tokens)"),
        (
            {"rewards": {"correctness": 0.0, "strict_format": 0.0}},
            "no answer tag is found (strict_format = 0",
        ),
        ({"rewards": {"correctness": 0.0}}, "every completion gets 0 from correctness"),
    ],
)
def test_a_reward_of_zero_names_its_likely_cause(changes, cause):
    line = text(NO_REWARD | changes)
    assert cause in line
    assert line.startswith(
        "no completion has" if changes.get("reward_mean", 0) is None else "the reward is 0 for"
    )
    assert "for 5 updates (health.patience_updates)" in line


def test_a_cause_is_named_from_its_bound_on():
    assert "are cut before an answer" in text(NO_REWARD | {"truncated_share": 0.5})
    assert "every completion gets 0" in text(NO_REWARD | {"truncated_share": 0.49, "rewards": {"x": 0.0}})
    assert "every completion gets 0" in text(
        NO_REWARD | {"completion_length_mean": 2.0, "rewards": {"x": 0.0}}
    )
    # Within 5 % of the most that the rewards can give together, of which a malus is no part.
    best = {"functions": {"a": 20.0, "malus": -0.5}}
    assert "solved every time" in text(EQUAL_REWARDS | {"reward_mean": 19.0}, **best)
    assert "too easy or too hard" in text(EQUAL_REWARDS | {"reward_mean": 18.99}, **best)
    assert "lora_keys" in text({"grad_norm": 0.0, "clip_share": 0.5})
    assert "clip_eps" in text({"grad_norm": 0.0, "clip_share": 0.51})
    stale = {"staleness": {"2": 8}}
    assert "the workers are the slower half" in text(stale | {"learner_wait_share": 0.5}, max_staleness=2)
    assert "the learner is the slower half" in text(stale | {"learner_wait_share": 0.49}, max_staleness=2)
    gap = {"mismatch_kl": 0.06, "staleness": {"0": 8}}
    assert "lora_dropout" not in text(gap, fine_tune_type="lora", lora_dropout=0.1, ratio="recomputed")


def test_as_many_failures_as_are_allowed_raise_nothing():
    for changes in (FAILED, FAILED | {"reward_failures": {}}):  # 8 of 64
        assert raised([changes], max_failed_share=0.125) == []
        assert len(raised([changes], max_failed_share=0.124)) == 1


def test_equal_rewards_mean_too_easy_problems_if_all_are_the_best():
    assert "solved every time" in text(EQUAL_REWARDS | {"reward_mean": 1.0})
    assert "set selection.dynamic_sampling = true" in text(EQUAL_REWARDS | {"reward_mean": 0.3})


def test_dynamic_sampling_is_not_advised_if_it_is_on():
    line = text(EQUAL_REWARDS | {"reward_mean": 0.3}, dynamic_sampling=True)
    assert "dynamic_sampling" not in line
    assert "selection.refill_limit" in line


def test_a_zero_gradient_says_what_keeps_the_tokens_from_training():
    nothing_trains = {"grad_norm": 0.0, "ratio_mean": None, "entropy": None, "truncated_share": 0.7}
    assert "mask_truncated" in text(nothing_trains)
    assert "clip_eps" in text({"grad_norm": 0.0, "clip_share": 0.99})
    assert "lora_keys" in text({"grad_norm": 0.0})


def test_disagreeing_workers_are_quantised_or_stale_or_compute_differently():
    gap = {"mismatch_kl": 0.06, "staleness": {"0": 8}}
    assert "model.dtype" in text(gap)
    assert "rollout.max_staleness" in text(gap | {"staleness": {"1": 8}})
    assert "model.lora_dropout" in text(gap, fine_tune_type="lora", lora_dropout=0.1)
    assert "rollout_bits" in text(gap, quantize_for_rollouts=True)
    assert "rollout.kv_bits" in text(gap, kv_bits=4)
    assert "health.max_mismatch_kl = 0.05" in text(gap)


def test_always_stale_says_which_half_is_slower():
    stale = {"staleness": {"4": 8}}
    assert "the learner is the slower half" in text(stale, max_staleness=4)
    assert "the workers are the slower half" in text(stale | {"learner_wait_share": 0.7}, max_staleness=4)


def test_a_staleness_bound_of_one_update_is_normally_reached():
    assert raised([{"staleness": {"1": 8}}] * 20, max_staleness=1) == []


@pytest.mark.parametrize(
    "name", [name for name in SIGNS if name not in ("gradient is zero", "learning rate is zero")]
)
def test_the_line_names_its_threshold(name):
    updates, sick, _ = SIGNS[name]
    line = text(sick, updates, max_staleness=3)
    settings = re.findall(r"health\.(\w+)", line)
    assert settings
    assert all(OWNER[leaf] == "health" for leaf in settings)


@pytest.mark.parametrize("name", SIGNS)
def test_the_cure_names_settings_that_exist(name):
    updates, sick, _ = SIGNS[name]
    line = text(sick, updates, max_staleness=3)
    sections = "model|data|reward|rollout|selection|objective|learner|health"
    for section, leaf in re.findall(rf"\b({sections})\.(\w+)", line):
        assert OWNER.get(leaf) == section, line


def test_the_format_rewards_are_built_in_ones():
    assert set(FORMAT_REWARDS) <= set(REWARDS)


def test_a_template_whose_turns_never_end_is_named_as_the_cause_of_cut_completions():
    cut = {**WELL, "truncated_share": 1.0}
    for changes, settings in ((cut, {}), ({**cut, **NO_REWARD, "truncated_share": 0.5}, {})):
        health = Health(config(**settings), ends_turns=False)
        (alarm,) = [alarm for _ in range(PATIENCE) for alarm in health.check(changes)]
        assert NO_END in alarm.text
    health = Health(config(stop=["###"]), ends_turns=False)
    (alarm,) = [alarm for _ in range(PATIENCE) for alarm in health.check(cut)]
    assert "too few for an answer" in alarm.text
