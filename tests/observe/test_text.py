"""Numbers as text: where a unit, a digit or a word changes."""

import pytest
from scores import score

from grpo_actors.observe.text import (
    aligned,
    bytes_text,
    count,
    duration,
    estimate,
    fixed,
    headcount_line,
    pace,
    progress,
    share,
    sparkline,
    status_line,
)
from grpo_actors.observe.text import score as scored
from grpo_actors.observe.view import RunView


def test_columns_are_aligned_the_first_to_the_left_and_no_line_ends_with_blanks():
    assert aligned([["a", "1", "22"], ["long", "333", "4"], ["b", "", ""]]) == [
        "a       1  22",
        "long  333   4",
        "b",
    ]
    with pytest.raises(ValueError, match="zip"):
        aligned([["a", "1"], ["b"]])


@pytest.mark.parametrize(
    ("form", "texts"),
    [
        # The smallest number that two digits show is 0.01; from 1e7 on there are too many of them.
        (fixed, {0.01: "0.01", 0.0099: "9.9e-03", -0.0099: "-9.9e-03", 9_999_999.0: "9999999.00", 1e7: "1.0e+07"}),
        # What would be rounded to 0.0 %, and what to 10.0 %.
        (share, {0.00049: "<0.1 %", 0.0005: "0.1 %", 0.0994: "9.9 %", 0.0995: "10 %", 0.1: "10 %"}),
        (count, {9_999: "9,999", 1e4: "10.0k", -2e4: "-20.0k", 999_949: "999.9k", 1e6: "1.0M", 1e9: "1.0G"}),
        (duration, {0: "0:00", -5: "0:00", 59.4: "0:59", 59.6: "1:00", 3599: "59:59", 3600: "1:00:00"}),
        (duration, {99_999_999: "27777:46:39", 1e8: "–", None: "–"}),
        (bytes_text, {None: "–", 949_600: "950 kB", 1e6: "1.0 MB", 9.99e8: "999.0 MB", 1e9: "1.0 GB", 4.5e9: "4.5 GB"}),
        (pace, {1.0: "1.0 up/s", 0.5: "2.0 s/up"}),
    ],
)  # fmt: skip
def test_a_number_changes_its_form_exactly_where_it_should(form, texts):
    assert {value: form(value) for value in texts} == texts


def test_a_curve_has_a_column_for_each_value_up_to_the_width_and_uses_all_bars():
    assert sparkline([0.0, 1.0], 1) == "▁", "the one mean is the lowest and the highest"
    assert sparkline([0.0, 7.0], 9) == "▁█"
    assert sparkline([-7.0, *range(-6, 1)], 8) == "▁▂▃▄▅▆▇█"
    # 5 values on 2 columns: round(5 / 2) = 2 of them, then 3; means 0 and 2.
    assert sparkline([0.0, 0.0, 1.0, 2.0, 3.0], 2) == "▁█"
    # On 3 columns 2, 1 and 2 of them; means 0, 4 and 7.
    assert sparkline([0.0, 0.0, 4.0, 7.0, 7.0], 3) == "▁▅█"
    assert sparkline([1.0, 2.0], 0) == ""


def test_progress_names_the_plan_if_there_is_one():
    assert progress(RunView(start={"total_updates": 9})) == "0/9"
    assert progress(RunView()) == "0"


def test_a_score_is_that_of_its_metric_and_a_part_of_an_interval_is_none():
    assert (
        scored({"update": 10, "score": score(1.25, metric="own.py:brevity").model_dump()})
        == "brevity 1.25 @10"
    )
    whole, half = {"value": 0.5, "low": 0.25, "high": 0.75}, {"value": 0.5, "low": 0.25}
    assert estimate({"gain": whole}, "gain") == "0.50 [0.25, 0.75]"
    assert estimate({"gain": half}, "gain") == estimate({"gain": {"value": 0.5, "high": 1}}, "gain") == "0.50"


def test_a_decision_about_the_workers_says_what_changes():
    decided = {"before": 1, "workers": 2, "reason": "the learner waits"}
    assert headcount_line(decided) == "rollout workers: 1 → 2 (the learner waits)"
    assert headcount_line(decided | {"before": 2}) == "rollout workers: 2, settled (the learner waits)"


def test_a_line_that_just_fits_is_whole():
    view = RunView(metrics={"update": 1, "loss": 0.5, "kl": 0.25})
    whole = status_line(view)
    assert "KL 0.2500" in whole
    assert status_line(view, width=len(whole)) == whole
    assert status_line(view, width=len(whole) - 1) == whole.replace("KL 0.2500  ", "")
