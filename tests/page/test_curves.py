"""Curves: rows of updates, and their down-sampled form."""

import math

import numpy as np
import pytest

from grpo_actors.page.curves import Curves


def curves(count: int, **columns) -> Curves:
    table = Curves()
    for update in range(1, count + 1):
        table.append(update, {name: column(update) for name, column in columns.items()})
    return table


def test_few_rows_are_shown_as_they_are():
    sampled = curves(5, a=float).sampled(400)
    assert (sampled.width, sampled.x.tolist()) == (1, [1, 2, 3, 4, 5])
    assert sampled.curves["a"].mean.tolist() == sampled.curves["a"].high.tolist() == [1, 2, 3, 4, 5]


def test_ten_thousand_rows_are_at_most_as_many_buckets_as_asked_and_keep_every_peak():
    # 10,000 rows in at most 400 buckets: the width is the power of two from 25 on, 32; 10,000 / 32 = 312.5.
    sampled = curves(10_000, a=lambda update: 100.0 if update == 7777 else 1.0).sampled(400)
    assert (sampled.width, len(sampled.x)) == (32, 313)
    bucket = 7776 // 32  # the row of update 7777 has index 7776
    assert sampled.curves["a"].high[bucket] == 100
    assert sampled.curves["a"].mean[bucket] == pytest.approx((31 + 100) / 32)
    assert sampled.curves["a"].low[bucket] == 1


def test_buckets_stay_the_same_while_the_table_grows():
    before, after = (curves(count, a=float).sampled(10) for count in (70, 80))
    assert before.width == after.width == 8
    assert before.curves["a"].mean[:8].tolist() == after.curves["a"].mean[:8].tolist()


def test_a_part_of_the_run_is_shown_with_more_detail():
    sampled = curves(10_000, a=float).sampled(400, 5000, 5100)
    assert (sampled.width, sampled.x[0], sampled.x[-1]) == (1, 5000, 5100)


def test_a_part_begins_with_a_whole_bucket():
    whole, part = (curves(80, a=float).sampled(10, first) for first in (1, 4))
    assert whole.width == 8
    assert part.x.tolist() == whole.x.tolist()


def test_what_was_not_measured_is_no_number_and_does_not_spoil_its_bucket():
    table = curves(4, a=lambda update: math.nan if update < 3 else update)
    assert np.isnan(table.sampled(2).curves["a"].mean).tolist() == [True, False]
    assert table.sampled(1).curves["a"].mean.tolist() == [3.5]


def test_a_curve_that_begins_late_has_no_numbers_before():
    table = curves(2, a=float)
    table.append(3, {"a": 3, "b": 7})
    assert np.isnan(table.sampled(9).curves["b"].mean).tolist() == [True, True, False]
    assert (table.latest("b"), table.latest("c")) == (7, None)


def test_a_resumed_run_replaces_the_updates_that_it_repeats():
    table = curves(5, a=float)
    table.append(3, {"a": 30})
    assert table.sampled(9).x.tolist() == [1, 2, 3]
    assert table.sampled(9).curves["a"].mean.tolist() == [1, 2, 30]
    assert (len(table), table.names) == (3, ["a"])
    assert table.latest("a") == 30
