"""The table of results: a line for each checkpoint, with the columns that its answers allow."""

import re
from dataclasses import replace

from grpo_actors.evaluator.comparison.result import Completions, Result, Sampled
from grpo_actors.evaluator.comparison.table import as_table
from grpo_actors.score import Estimate

SHORT, LONG = Completions(3.0, 0.125, {"correctness": 0.5}), Completions(12.25, 0.0, {"brevity": 1.0})


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.125, high=value + 0.25)


def result(name: str, update: int | None, completions: Completions, k: int = 0) -> Result:
    passed = {i: estimate(i / 8) for i in (1, 2, 4) if i <= k}
    sampled = Sampled(k, 0.5, estimate(0.25), estimate(0.375), passed, completions) if k else None
    return Result(name, None, update, 12, estimate(0.5), completions, sampled, 1.0)


def cells(table: str) -> list[list[str]]:
    return [re.split(" {2,}", line.strip()) for line in table.splitlines()]


def test_greedy_results_have_a_line_each_and_a_column_for_each_reward_that_any_has():
    table = as_table([result("base", 0, SHORT), result("other", None, LONG)], "sums", 40)
    assert cells(table) == [
        ["12 held-out problems of sums, answered greedily in at most 40 tokens"],
        ["checkpoint", "update", "accuracy", "95 %", "length", "truncated", "correctness", "brevity"],
        ["base", "0", "50.0 %", "37.5–75.0", "3.0", "12.5 %", "0.500", "–"],
        ["other", "–", "50.0 %", "37.5–75.0", "12.2", "0.0 %", "–", "1.000"],
    ]


def test_samples_have_their_mean_their_majority_and_what_some_of_them_solve():
    greedy = [result("base", 0, SHORT)]
    table = as_table([result("base", 0, SHORT, k=4)], "sums", 40)
    assert cells(table)[:3] == cells(as_table(greedy, "sums", 40))
    assert cells(table)[3:] == [
        [""],
        ["4 samples of each problem at temperature 0.5"],
        [
            *("checkpoint", "update", "avg@4", "95 %", "maj@4", "95 %", "pass@2", "pass@4", "95 %"),
            *("length", "truncated"),
        ],
        [
            *("base", "0", "25.0 %", "12.5–50.0", "37.5 %", "25.0–62.5", "25.0 %", "50.0 %", "37.5–75.0"),
            *("3.0", "12.5 %"),
        ],
    ]


def test_one_sample_has_no_majority():
    one = result("base", 7, SHORT, k=1)
    assert cells(as_table([one], "sums", 40))[4:] == [
        ["one sample of each problem at temperature 0.5"],
        ["checkpoint", "update", "avg@1", "95 %", "length", "truncated"],
        ["base", "7", "25.0 %", "12.5–50.0", "3.0", "12.5 %"],
    ]
    assert cells(as_table([replace(one, sampled=None)], "sums", 40))[3:] == []


def test_two_samples_have_a_majority_and_nothing_between_one_and_all():
    table = cells(as_table([result("base", 7, SHORT, k=2)], "sums", 40))
    assert table[4] == ["2 samples of each problem at temperature 0.5"]
    assert table[5][2:-2] == ["avg@2", "95 %", "maj@2", "95 %", "pass@2", "95 %"]
    assert table[6][2:-2] == ["25.0 %", "12.5–50.0", "37.5 %", "25.0–62.5", "25.0 %", "12.5–50.0"]
