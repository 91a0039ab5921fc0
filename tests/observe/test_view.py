"""The fold over records, and its numbers as text."""

import pytest
from scores import score

from grpo_actors.observe.records import FIELDS, Record, make_record
from grpo_actors.observe.text import (
    count,
    duration,
    eval_line,
    fixed,
    pace,
    printable,
    share,
    sparkline,
    status_line,
    stop_line,
)
from grpo_actors.observe.view import CURVE_UPDATES, PACE_UPDATES, RunView


def fold(*records: tuple[str, dict], view: RunView | None = None) -> RunView:
    """Number the records from 1, one a second from time 100."""
    view = view or RunView()
    for topic, fields in records:
        view = view.apply(make_record(view.seq + 1, 100.0 + view.seq, topic, fields))
    return view


def updates(numbers: range, **fields) -> list[tuple[str, dict]]:
    return [("metrics", {"update": number, **fields}) for number in numbers]


def evaluation(update: int, accuracy: float, *, best: bool) -> tuple[str, dict]:
    return ("eval", {"update": update, "best": best, "score": score(accuracy).model_dump()})


def test_the_newest_metrics_and_their_curve_are_kept():
    view = fold(*updates(range(1, 4), loss=0.5, reward_mean=0.25))
    assert view.update == 3
    assert [(point.update, point.loss, point.reward, point.length) for point in view.curve] == [
        (1, 0.5, 0.25, None),
        (2, 0.5, 0.25, None),
        (3, 0.5, 0.25, None),
    ]


def test_applying_a_record_leaves_the_old_view_as_it_was():
    before = fold(("worker", {"worker": "rollout-0", "state": "joined"}))
    after = fold(("worker", {"worker": "rollout-1", "state": "joined"}), view=before)
    assert list(before.workers) == ["rollout-0"]
    assert list(after.workers) == ["rollout-0", "rollout-1"]


def test_the_curve_is_bounded():
    view = fold(*updates(range(CURVE_UPDATES + 10)))
    assert len(view.curve) == CURVE_UPDATES
    assert view.curve[-1].update == CURVE_UPDATES + 9


def test_a_resumed_run_replaces_what_it_repeats():
    view = fold(*updates(range(1, 6)), evaluation(2, 0.3, best=True), evaluation(5, 0.4, best=True))
    view = fold(("start", {"run_name": "again"}), *updates(range(3, 5), loss=9.0), view=view)
    assert [(point.update, point.loss) for point in view.curve] == [(1, None), (2, None), (3, 9.0), (4, 9.0)]
    assert [record["update"] for record in view.evals] == [2]


def test_a_resumed_start_forgets_the_workers_and_the_stop():
    view = fold(
        ("worker", {"worker": "w", "state": "sampling"}), ("stop", {"reason": "Ctrl-C", "exit_code": 0})
    )
    view = fold(("start", {}), view=view)
    assert view.stop is None
    assert not view.workers


def test_a_first_start_forgets_everything():
    view = fold(*updates(range(1, 6))).apply(make_record(1, 200.0, "start", {"run_name": "new"}))
    assert view.curve == ()
    assert view.metrics is None


def test_the_best_evaluation_is_the_last_that_said_so():
    view = fold(
        evaluation(10, 0.3, best=True), evaluation(20, 0.5, best=True), evaluation(30, 0.4, best=False)
    )
    assert view.last_eval is not None
    assert view.best_eval is not None
    assert view.last_eval["update"] == 30
    assert view.best_eval["update"] == 20


def test_pace_and_time_left_follow_from_the_records_times():
    # Updates 1 to 5 at one a second: pace (5 - 1) / 4 s = 1, and 10 - 5 = 5 updates left.
    view = fold(*updates(range(1, 6), total_updates=10))
    assert view.updates_per_s == 1.0
    assert view.remaining_s == 5.0
    # At two in a second they take half of that.
    twice = fold(*updates(range(2, 11, 2), total_updates=20))
    assert (twice.updates_per_s, twice.remaining_s) == (2.0, 5.0)
    for few in (0, 1):
        assert fold(*updates(range(1, 1 + few), total_updates=10)).remaining_s is None


def test_the_pace_is_that_of_the_last_updates_and_a_pause_before_them_does_not_count():
    view = RunView()
    for number in range(PACE_UPDATES + 2):  # an hour, then one update a second
        time = 0.0 if number == 0 else 3600.0 + number
        view = view.apply(make_record(number + 1, time, "metrics", {"update": number, "total_updates": 10}))
        if number == PACE_UPDATES:
            assert view.updates_per_s == pytest.approx(PACE_UPDATES / (3600 + PACE_UPDATES))
    assert view.updates_per_s == 1.0
    assert view.remaining_s == 0.0, "more updates than were planned"


def test_updates_at_one_time_have_no_pace():
    view = RunView()
    for number in (1, 2):
        view = view.apply(make_record(number, 5.0, "metrics", {"update": number, "total_updates": 9}))
    assert (view.updates_per_s, view.remaining_s) == (None, None)


def test_an_update_that_is_repeated_replaces_its_point_and_its_evaluation():
    view = fold(*updates(range(1, 4), loss=0.5), evaluation(2, 0.3, best=True), evaluation(3, 0.3, best=True))
    view = fold(*updates(range(3, 4), loss=9.0), view=view)
    assert [(point.update, point.loss) for point in view.curve] == [(1, 0.5), (2, 0.5), (3, 9.0)]
    assert [record["update"] for record in view.evals] == [2]


def test_a_sample_without_its_texts_does_not_replace_one_with_them():
    whole = {"update": 1, "problem": "p", "completions": [{"text": "x"}]}
    view = fold(("sample", whole), ("sample", {"update": 2, "problem": "q"}))
    assert view.sample is not None
    assert view.sample["update"] == 1


@pytest.mark.parametrize("value", [None, "x", [], {}, True, -1, 1e300, 10**400])
@pytest.mark.parametrize("topic", FIELDS)
def test_no_value_of_a_field_breaks_the_view_or_its_line(topic, value):
    record: Record = {"seq": 2, "time": 5.0, "topic": topic, **dict.fromkeys(FIELDS[topic], value)}
    view = fold(*updates(range(1, 3))).apply(record).apply({**record, "seq": 3, "time": 6.0})
    assert status_line(view).startswith("update")


def test_an_unknown_topic_changes_only_number_and_time():
    view = RunView().apply({"seq": 4, "time": 5.0, "topic": "new in a later version"})
    assert view == RunView(seq=4, time=5.0)
    assert (RunView().seq, RunView().time) == (0, None)


def test_the_status_line_names_what_matters():
    fields = {
        "total_updates": 110,
        "reward_mean": 0.62,
        "loss": 0.0123,
        "kl": 0.001,
        "completion_length_mean": 35.4,
    }
    view = fold(*updates(range(11, 13), **fields), evaluation(10, 0.41, best=True))
    assert status_line(view) == (
        "update 12/110  reward 0.62  accuracy 0.41 @10  greedy  loss 0.0123  KL 0.0010  len 35  1.0 up/s"
    )


@pytest.mark.parametrize("width", [80, 70, 60, 50])
def test_the_status_line_fits_a_narrow_terminal_by_leaving_out(width):
    fields = {
        "total_updates": 110,
        "reward_mean": 0.62,
        "loss": 0.0123,
        "kl": 0.001,
        "completion_length_mean": 35.4,
    }
    line = status_line(
        fold(*updates(range(109, 111), **fields), evaluation(100, 0.41, best=True)), width=width
    )
    assert len(line) <= width
    assert line.startswith("update 110/110  reward 0.62  accuracy 0.41 @100")


def test_an_evaluation_is_one_line_with_its_interval():
    record = {"update": 10, "score": score(0.41, problems=200).model_dump(), "best": True}
    assert eval_line(record) == "eval @10  accuracy 0.41 [0.31, 0.51], greedy on 200 problems  best so far"
    sampled = score(1.25, metric="reward", temperature=0.5).model_dump()
    gain = {"value": 0.5, "low": -0.125, "high": 1.125}
    assert eval_line({"update": 10, "score": sampled, "gain": gain}) == (
        "eval @10  reward 1.25 [1.15, 1.35], sampled at 0.5 on 10 problems  gain 0.50 [-0.12, 1.12]"
    )
    assert eval_line({"update": 10, "score": None}) == "eval @10  score –, greedy"


def test_a_failed_end_shows_its_exit_code():
    assert stop_line({"reason": "done", "exit_code": 0}) == "run ended: done"
    assert stop_line({"reason": "out of memory", "exit_code": 1}) == "run ended: out of memory (exit code 1)"


def test_numbers_are_short_and_never_falsely_zero():
    assert [fixed(x) for x in (None, 0.0, 0.621, 0.00031, -12.5, 1e300)] == [
        "–",
        "0.00",
        "0.62",
        "3.1e-04",
        "-12.50",
        "1.0e+300",
    ]
    assert [share(x) for x in (None, 0.0, 0.0001, 0.012, 0.5, 1.0)] == [
        "–",
        "0 %",
        "<0.1 %",
        "1.2 %",
        "50 %",
        "100 %",
    ]
    assert [count(x) for x in (None, 950, 9_999, 12_345, 4.5e6, 2e9)] == [
        "–",
        "950",
        "9,999",
        "12.3k",
        "4.5M",
        "2.0G",
    ]
    assert [duration(x) for x in (None, 42, 725, 11_229)] == ["–", "0:42", "12:05", "3:07:09"]
    assert [pace(x) for x in (None, 0.0, 1.24, 0.25)] == ["–", "–", "1.2 up/s", "4.0 s/up"]


def test_a_sparkline_averages_neighbours_and_leaves_out_the_unknown():
    # Four values on two columns: means 0.5 and 6.5, the lowest and the highest bar.
    assert sparkline([0.0, 1.0, None, 6.0, 7.0], 2) == "▁█"
    assert sparkline([1.0], 5) == sparkline([1.0, 2.0], 0) == ""
    assert sparkline([3.0, 3.0], 9) == "▁▁"


def test_foreign_text_cannot_steer_the_terminal():
    assert printable("a\x1b[2J\nb\tc\x07") == "a�[2J b c�"
