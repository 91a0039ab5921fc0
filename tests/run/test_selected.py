"""Runs with a selection: full updates of groups that teach, a task without a signal, a resume."""

import json

import pytest
from runs import kill


def flat_reward(run) -> str:
    """Return the setting that names an own reward function which is always 1."""
    (run.folder.parent / "flat.py").write_text(
        "def flat(prompts, completions, answer, **columns):\n    return [1.0] * len(completions)\n"
    )
    return '--set=functions={"flat.py:flat" = 1.0}'


def test_every_update_has_as_many_groups_as_asked_for_and_all_of_them_teach(make_run):
    run = make_run(dynamic_sampling=True, oversampling=1.5, eval_every_updates=0)
    assert run.run() == 0, run.stderr
    records = run.records("metrics")
    assert [record["groups"] for record in records] == [2] * 6
    assert [record["zero_variance_share"] for record in records] == [0.0] * 6
    assert sum(sum(record["groups_passed_over"].values()) for record in records) > 0
    leases = [lease for lease, *_ in run.ledger()]
    assert leases == sorted(set(leases))
    # Everything before the cursor either trained or was passed over.
    passed_over = sum(sum(record["groups_passed_over"].values()) for record in records)
    state = json.loads((run.folder / "checkpoint-6" / "state.json").read_text())
    assert leases[-1] + 1 == 12 + passed_over <= state["cursor"]["position"]


@pytest.mark.slow
def test_a_task_without_a_signal_is_reported_and_trained_to_its_end(make_run):
    run = make_run(dynamic_sampling=True, refill_limit=2, max_updates=3, eval_every_updates=0)
    assert run.run(flat_reward(run)) == 0, run.stderr
    assert [record["groups_passed_over"] for record in run.records("metrics")] == [{"no_signal": 4}] * 3
    assert [record["zero_variance_share"] for record in run.records("metrics")] == [1.0] * 3
    (alarm,) = run.records("alarm")
    assert (alarm["name"], alarm["update"]) == ("no signal", 1)
    assert alarm["text"].startswith("4 groups were passed over for one update (selection.refill_limit)")
    assert [lease for lease, *_ in run.ledger()] == [4, 5, 10, 11, 16, 17]


@pytest.mark.slow
def test_a_task_without_a_signal_ends_the_run_with_on_alarm_stop(make_run):
    run = make_run(dynamic_sampling=True, refill_limit=2, on_alarm="stop", eval_every_updates=0)
    assert run.run(flat_reward(run)) == 1, run.stderr
    (alarm,) = run.records("alarm")
    (stop,) = run.records("stop")
    assert (stop["reason"], stop["exit_code"]) == (f"alarm: no signal: {alarm['text']}", 1)
    assert run.updates() == 1
    assert run.checkpoints() == [1]


@pytest.mark.slow
def test_a_killed_run_that_selects_continues_bit_by_bit(make_run):
    # Twelve problems: the curriculum meets them again from the third update on.
    settings = {
        "max_staleness": 0,
        "workers": 1,
        "batch_groups": 2,
        "max_updates": 14,
        "save_steps": 1,
        "max_train_samples": 12,
        "dynamic_sampling": True,
        "max_success": 0.8,
        "oversampling": 2.0,
        "curriculum": True,
    }
    whole, cut = make_run(**settings), make_run(**settings)
    assert whole.run() == 0, whole.stderr
    for update in (4, 9):
        cut.start()
        cut.wait_for_update(update)
        kill(cut.child("learner"))
        cut.end()
    assert cut.run() == 0, cut.stderr
    cut.assert_no_gap_in_records()
    assert cut.curve() == whole.curve()
    assert cut.ledger() == whole.ledger()
    for key in ("groups_passed_over", "problems_skipped"):
        continued, expected = ([record[key] for record in run.records("metrics")] for run in (cut, whole))
        assert continued == expected
        assert any(expected)
    states = [json.loads((r.folder / "checkpoint-14" / "state.json").read_text()) for r in (cut, whole)]
    assert states[0]["cursor"] == states[1]["cursor"]
    assert states[0]["success_rates"] == states[1]["success_rates"] != {}
