"""What the page shows of a run: the fold over its records, and its form as JSON values."""

import base64
import math
from typing import Any

import numpy as np
import pytest
from scores import score

from grpo_actors.observe.records import Record, make_record
from grpo_actors.page.run_state import NOTES_KEPT, RunState
from grpo_actors.page.settings import by_name, config_of, differing
from grpo_actors.page.views import LINES_SHOWN, run_view, score_sources, shown_names


def state_of(*records: tuple[str, dict[str, Any]], seq: int = 0) -> RunState:
    """Number the records from 1, one a second from time 100."""
    state = RunState()
    for number, (topic, fields) in enumerate(records, seq + 1):
        state.apply(make_record(number, 99.0 + number, topic, fields))
    return state


def update(number: int, **fields: Any) -> tuple[str, dict[str, Any]]:
    return ("metrics", {"update": number, "total_updates": 9, **fields})


def unpacked(text: str) -> list[float]:
    return np.frombuffer(base64.b64decode(text), "<f4").tolist()


START = ("start", {"model_name": "tiny", "total_updates": 9})


def test_every_number_of_an_update_is_a_curve_and_its_position_is_none():
    fields = {
        "loss": 0.5,
        "rewards": {"a": 1.0, "b": None},
        "reward_by_source": {"s": 0.25},
        "logprob_gaps": {"w": 0.125},
        "reward_failures": {"a": 3},
        "memory_gb": 1.5,
        "peers_memory_gb": {"w": 0.5},
        "kl": None,
    }
    curves = state_of(START, update(1, **fields)).curves
    assert {name: curves.latest(name) for name in curves.names} == {
        "loss": 0.5,
        "memory_gb": 1.5,
        "rewards/a": 1.0,
        "reward_by_source/s": 0.25,
        "logprob_gaps/w": 0.125,
        "reward_failures/a": 3.0,
        "memory/learner": 1.5,
        "memory/w": 0.5,
    }


def test_staleness_is_the_mean_of_the_groups_and_the_rewards_have_a_band_of_one_deviation():
    fields = {"staleness": {"0": 1, "3": 2, "odd": 9}, "reward_mean": 0.75, "reward_std": 0.5}
    curves = state_of(update(1, **fields)).curves
    # (0 · 1 + 3 · 2) / 3
    assert [curves.latest(name) for name in ("staleness_mean", "reward_low", "reward_high")] == [
        2.0,
        0.25,
        1.25,
    ]
    for fields in ({"staleness": {"0": 0}}, {"reward_mean": 0.75}, {"reward_std": 0.75}):
        names = state_of(update(1, **fields)).curves.names
        assert not {"staleness_mean", "reward_low", "reward_high"} & set(names)


def test_a_run_that_begins_anew_forgets_its_curves_and_notes_and_one_that_goes_on_keeps_them():
    notes = (("alarm", {"name": "kl", "text": "x"}), ("log", {"level": "info", "text": "y"}))
    state = state_of(START, update(1, loss=0.5), *notes)
    assert state.applied == 4
    state.apply(make_record(5, 105.0, *START))
    assert (len(state.curves), len(state.alarms), len(state.logs), state.applied) == (1, 1, 1, 5)
    state.apply(make_record(1, 106.0, *START))
    assert (len(state.curves), len(state.alarms), len(state.logs), state.applied) == (0, 0, 0, 6)
    assert state.timeline.spans() == []


def test_the_newest_notes_are_kept_and_the_newest_of_those_shown():
    alarms = [("alarm", {"name": f"a{n}", "text": "x", "update": n}) for n in range(NOTES_KEPT + 1)]
    logs = [("log", {"level": "info", "text": f"l{n}"}) for n in range(NOTES_KEPT + 1)]
    state = state_of(*alarms, *logs)
    assert [state.alarms[0]["name"], state.logs[0]["text"]] == ["a1", "l1"]
    view = run_view(state)
    assert [note["name"] for note in view["alarms"]] == [
        f"a{n}" for n in range(NOTES_KEPT + 1 - LINES_SHOWN, NOTES_KEPT + 1)
    ]
    assert view["alarms"][-1] == {
        "time": 100.0 + NOTES_KEPT,
        "name": f"a{NOTES_KEPT}",
        "text": "x",
        "update": NOTES_KEPT,
    }
    assert len(view["log"]) == LINES_SHOWN
    assert view["log"][-1] | {"time": 0} == {
        "time": 0,
        "name": "info",
        "text": f"l{NOTES_KEPT}",
        "update": None,
    }


STOP = ("stop", {"reason": "done", "exit_code": 0})


@pytest.mark.parametrize(
    ("records", "over", "shown"),
    [
        ([START], None, ("starting", "")),
        ([START, update(1)], None, ("running", "")),
        ([START, update(1)], "its process is gone", ("gone", "its process is gone")),
        ([START, update(1), STOP], "its process is gone", ("ended", "done")),
        ([START, ("stop", {"reason": "no memory", "exit_code": 1})], None, ("failed", "no memory")),
    ],
)
def test_a_run_starts_runs_and_ends_well_or_not_or_is_gone(records, over, shown):
    summary = run_view(state_of(*records), over=over)["summary"]
    assert (summary["state"], summary["why"]) == shown


def evaluation(number: int, value: float, *, best: bool, **fields: Any) -> tuple[str, dict[str, Any]]:
    name = f"checkpoint-{number}" if number else "base"
    whole = {"update": number, "checkpoint": name, "best": best, "score": score(value).model_dump()}
    return ("eval", whole | fields)


def test_the_summary_has_the_base_the_best_and_what_is_measured():
    gain = {"value": 0.25, "low": 0.0, "high": 0.5}
    evals = [
        evaluation(0, 0.25, best=True),
        evaluation(1, 0.5, best=True, gain=gain),
        evaluation(2, 0.375, best=False),
    ]
    state = state_of(START, update(1), update(2, update_s=8.0, reward_mean=0.5, reward_std=0.25), *evals)
    summary = run_view(state)["summary"]
    assert [summary[name]["value"] for name in ("base", "best", "gain")] == [0.25, 0.5, 0.25]
    assert (summary["best_checkpoint"], summary["model"]) == ("checkpoint-1", "tiny")
    assert summary["measure"] == "accuracy, greedy, 10 held-out problems"
    assert [summary[name] for name in ("update", "total", "update_s", "reward", "reward_std")] == [
        2,
        9,
        8.0,
        0.5,
        0.25,
    ]
    # Six records, one a second; an update a second, so seven seconds to the ninth.
    assert (summary["seconds"], summary["remaining_s"]) == (5.0, 7.0)
    assert run_view(state_of(START, update(1), update(2), STOP))["summary"]["remaining_s"] is None
    empty = run_view(RunState())["summary"]
    assert (empty["base"], empty["best"], empty["measure"], empty["seconds"], empty["model"]) == (
        None,
        None,
        "",
        None,
        "",
    )


def test_a_clock_that_was_set_back_gives_no_negative_time_and_a_sampled_score_its_temperature():
    state = RunState()
    state.apply(make_record(1, 500.0, *START))
    state.apply(
        make_record(
            2,
            400.0,
            *evaluation(1, 0.5, best=True, score=score(0.5, problems=1024, temperature=0.5).model_dump()),
        )
    )
    summary = run_view(state)["summary"]
    assert summary["seconds"] == 0.0
    assert summary["measure"] == "accuracy, sampled at temperature 0.5, 1,024 held-out problems"


def test_scores_have_their_interval_and_those_of_each_source():
    part = {"value": 0.5, "low": 0.25, "high": 0.75}
    state = state_of(
        evaluation(0, 0.25, best=False, score=None),
        evaluation(1, 0.5, best=True, by_source={"b": part, "a": part}),
    )
    base, first = run_view(state)["scores"]
    assert base == {"update": 0, "checkpoint": "base", "best": False, "by_source": {}}
    assert first | {"low": 0, "high": 0} == {
        "update": 1,
        "checkpoint": "checkpoint-1",
        "best": True,
        "by_source": {"b": part, "a": part},
        "value": 0.5,
        "low": 0,
        "high": 0,
    }
    assert score_sources(state.view) == ["b", "a"]


def test_workers_are_listed_by_name_and_those_that_are_gone_come_last():
    states = {"w2": "sampling", "w1": "waiting", "w0": "lost", "v": "left"}
    workers = [("worker", {"worker": name, "state": state, "groups": 3}) for name, state in states.items()]
    listed = run_view(state_of(*workers))["workers"]
    assert [one["name"] for one in listed] == ["w1", "w2", "v", "w0"]
    assert listed[0] == {
        "name": "w1",
        "role": "",
        "state": "waiting",
        "why": "",
        "device": "",
        "groups": 3,
        **dict.fromkeys(("tokens_per_s", "version", "memory_gb")),
    }


def test_curves_travel_as_numbers_of_32_bits_with_bounds_only_where_points_were_joined():
    few = run_view(state_of(update(1, loss=0.5), update(2), update(3, loss=-1.5, other=2.0)))["curves"]
    assert (few["width"], few["band"], list(few["mean"])) == (1, {}, ["loss"])
    assert unpacked(few["x"]) == [1, 2, 3]
    first, second, third = unpacked(few["mean"]["loss"])
    assert (first, math.isnan(second), third) == (0.5, True, -1.5)
    state = state_of(*(update(n, loss=float(n)) for n in range(1, 801)))
    many = run_view(state)["curves"]
    low, high = map(unpacked, many["band"]["loss"])
    assert (many["width"], low[:2], high[:2], unpacked(many["x"])[:2]) == (2, [1, 3], [2, 4], [1.5, 3.5])
    part = run_view(state, first=3, last=4)["curves"]
    assert (part["width"], unpacked(part["x"])) == (1, [3, 4])
    assert run_view(state)["latest"] == {"loss": 800.0}


def test_shown_are_the_curves_of_the_charts_each_once_and_the_bands():
    names = [
        "reward_high",
        "reward_mean",
        "memory_gb",
        "reward_low",
        "loss",
        "logprob_gaps/w",
        "logprob_gap_mean",
    ]
    # With one worker, its gap is the mean.
    assert shown_names(names) == ["reward_mean", "loss", "logprob_gap_mean", "reward_low", "reward_high"]
    assert shown_names(["reward_low"]) == ["reward_low"]


def test_the_timeline_counts_seconds_from_the_start():
    # Without a start, from the epoch.
    assert run_view(state_of(update(1, update_s=0.25)))["timeline"]["spans"][0][2:4] == [99.75, 100.0]
    shown = run_view(state_of(START, update(1, update_s=0.25, wait_s=0.0625)))["timeline"]
    assert shown == {
        "actors": ["learner"],
        "spans": [
            ["learner", "waits", 0.75, 0.812, "for groups of the workers"],
            ["learner", "trains", 0.812, 1.0, "update 1"],
        ],
    }


def start_of(**sections: Any) -> Record:
    return {"seq": 1, "time": 0.0, "topic": "start", "config": sections}


def test_settings_that_differ_are_those_of_any_run_but_places_and_names():
    one = by_name(start_of(run={"output_dir": "a", "seed": 1}, learner={"learning_rate": 0.5}, odd=3))
    other = by_name(start_of(run={"output_dir": "b", "seed": 1}, learner={"learning_rate": 0.25, "new": 1}))
    assert one == {"run.output_dir": "a", "run.seed": 1, "learner.learning_rate": 0.5}
    assert differing([one, other]) == {"learner.learning_rate": [0.5, 0.25], "learner.new": [None, 1]}
    assert by_name(None) == {}


def test_settings_of_another_version_are_none():
    assert config_of(start_of(learner={"learning_rate": 0.5})).learner.learning_rate == 0.5
    assert config_of(start_of(learner={"of_a_later_version": 1})) is None
