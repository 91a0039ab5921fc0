"""A run whose reward is always 0: the alarm is recorded, and may end the run in order."""

import pytest

SETTINGS = {
    "patience_updates": 3,
    "max_updates": 6,
    "save_steps": 0,
    # Completions of the embedded model have about 20 tokens; a limit below would be another cause of reward 0.
    "max_new_tokens": 40,
}


@pytest.fixture
def zero_reward(tmp_path):
    """Return the setting that names an own reward function which is always 0."""
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(
        "def nothing(prompts, completions, answer, **columns):\n    return [0.0] * len(completions)\n"
    )
    return f'--set=reward.functions={{"{rewards}:nothing" = 1.0}}'


def test_a_reward_that_always_fails_ends_the_run_after_three_updates_with_its_traceback(make_run, tmp_path):
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text('def labelled(completions, **columns):\n    raise KeyError("label")\n')
    run = make_run(**SETTINGS, eval_every_updates=0)
    functions = f'--set=reward.functions={{"{rewards}:labelled" = 1.0, correctness = 1.0}}'
    assert run.run(functions) == 1, run.stderr
    assert run.updates() == 3
    assert run.checkpoints() == [3]
    alarms = {alarm["name"]: alarm for alarm in run.records("alarm")}
    assert alarms["reward fails"]["update"] == 1
    last = alarms["reward always fails"]
    assert last["update"] == 3
    error = (
        f"{rewards}:labelled failed for every completion of 3 updates: raised KeyError: 'label' ({rewards}:2)"
    )
    assert last["text"].startswith(error)
    assert 'raise KeyError("label")' in last["text"]
    (stop,) = run.records("stop")
    assert stop["reason"].startswith(f"alarm: reward always fails: {error}")
    # The groups of three updates failed alike, and the log has it once.
    assert len([log for log in run.records("log") if "KeyError" in log["text"]]) == 1
    assert "KeyError" in run.stderr


@pytest.mark.slow
def test_the_alarm_is_given_once_and_the_run_goes_on(make_run, zero_reward):
    run = make_run(**SETTINGS, eval_every_updates=0)
    assert run.run(zero_reward) == 0, run.stderr
    (alarm,) = run.records("alarm")
    assert alarm["name"] == "reward is zero"
    assert alarm["update"] == 3
    assert "every completion gets 0 from " in alarm["text"]
    assert f"alarm: reward is zero: {alarm['text']}" in run.stderr
    assert run.updates() == 6


def test_the_alarm_ends_the_run_in_order_with_a_checkpoint_its_evaluation_and_exit_code_1(
    make_run, zero_reward
):
    run = make_run(**SETTINGS, on_alarm="stop", eval_every_updates=6, workers=0)
    assert run.run(zero_reward) == 1, run.stderr
    (alarm,) = run.records("alarm")
    (stop,) = run.records("stop")
    assert stop["reason"] == f"alarm: reward is zero: {alarm['text']}"
    assert stop["exit_code"] == 1
    assert run.updates() == 3
    assert run.checkpoints() == [3]
    assert [record["update"] for record in run.records("eval")] == [0, 3]
    assert "the same command continues the run after update 3" in run.stderr.splitlines()[-1]
    run.assert_no_gap_in_records()
    run.assert_nothing_left()
