import math
import time

import numpy as np
import pytest

from grpo_actors.errors import RewardError
from grpo_actors.tasks.rewards import REWARDS, built_in, checked_values

PERFECT = "<reasoning>\n40+2\n</reasoning>\n<answer>\n42\n</answer>\n"


def value(name, text, answer="42", thoughts=None):
    [reward] = REWARDS[name](
        prompts=[[{"role": "user", "content": "40+2?"}]],
        completions=[[{"role": "assistant", "content": text}]],
        answer=[answer],
        topic=["sums"],
        thoughts=[thoughts],
    )
    return reward


@pytest.mark.parametrize("name", REWARDS)
def test_a_perfect_completion_earns_the_whole_share(name):
    assert value(name, PERFECT, thoughts="40+2") == 1.0


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("text", ["", "42", "</answer><answer>"])
def test_a_completion_without_answer_or_format_earns_at_most_the_tags(name, text):
    # "</answer><answer>" has two of the four tags once, 2 × 0.25, and 8 characters of trailing text.
    most = 0.5 - 8 * 0.002 if name == "xml_count" and text.startswith("<") else 0.0
    assert value(name, text) == pytest.approx(most)


@pytest.mark.parametrize(
    ("thoughts", "text", "share"), [("40+2", "42", 1), ("40+2", " \n", 0), ("", "42", 0), (None, "42", 0)]
)
def test_think_format_wants_thoughts_that_end_and_then_an_answer(thoughts, text, share):
    assert value("think_format", text, thoughts=thoughts) == share


def test_correctness_reads_numbers_as_numbers():
    assert value("correctness", "<answer>$1,000.0</answer>", answer="1000") == 1.0
    assert value("correctness", "<answer>43</answer>") == 0.0


@pytest.mark.parametrize(("given", "share"), [("-7", 1), ("1,000", 1), ("7.0", 0), ("seven", 0), ("7 cm", 0)])
def test_integer_wants_a_whole_number_right_or_wrong(given, share):
    assert value("integer", f"<answer>{given}</answer>") == share


@pytest.mark.parametrize(
    "text",
    [
        "Sure! " + PERFECT,
        PERFECT + "That was easy.",
        PERFECT + PERFECT,
        PERFECT.replace("\n<answer>", "\nso\n<answer>"),
        "<reasoning><reasoning>a</reasoning><answer>42</answer>",
    ],
)
def test_strict_format_allows_no_text_around_the_format_and_soft_format_does(text):
    assert value("strict_format", text) == 0.0
    assert value("soft_format", text) == 1.0


def test_soft_format_wants_the_order():
    assert value("soft_format", "<answer>42</answer><reasoning>40+2</reasoning>") == 0.0


def test_xml_count_pays_a_quarter_for_each_tag_that_occurs_once():
    assert value("xml_count", "<reasoning>a</reasoning>") == 0.5
    # <answer> and </answer> occur twice: only the reasoning's tags count.
    assert value("xml_count", PERFECT + "<answer>1</answer>") == 0.5


def test_xml_count_charges_text_after_the_answer_but_never_below_zero():
    assert value("xml_count", PERFECT + "x" * 10) == pytest.approx(1 - 10 * 0.002)
    assert value("xml_count", PERFECT + "x" * 1000) == 0.0


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    "hostile", ["<reasoning>" * 90_000, "<reasoning></reasoning>" * 43_000, " " * 1_000_000]
)
def test_a_megabyte_of_hostile_text_is_scored_in_under_a_second(name, hostile):
    start_s = time.process_time()
    value(name, hostile)
    assert time.process_time() - start_s < 1


def test_an_unknown_reward_gets_the_nearest_name():
    with pytest.raises(RewardError, match="did you mean 'correctness'"):
        built_in("corectness")


def test_a_reward_far_from_all_names_gets_the_list():
    with pytest.raises(RewardError, match="known: correctness, integer"):
        built_in("zzz")


@pytest.mark.parametrize(
    "values",
    [[1, 0.5, None], (1, 0.5, None), [np.float32(1), np.float64(0.5), None], [np.int64(1), 0.5, None]],
)
def test_lists_of_numbers_of_any_kind_are_taken(values):
    assert checked_values(values, 3) == [1.0, 0.5, None]


def test_arrays_are_taken():
    assert checked_values(np.array([1, 0.5], dtype=np.float32), 2) == [1.0, 0.5]


@pytest.mark.parametrize(
    "values", [[True, False], [np.bool_(1), np.bool_(0)], np.array([True, False]), (x > 0 for x in (1, 0))]
)
def test_true_and_false_count_as_one_and_zero(values):
    assert checked_values(values, 2) == [1.0, 0.0]


@pytest.mark.parametrize("nan", [math.nan, np.float32("nan"), np.float64("nan")])
def test_nan_means_not_applicable_as_none_does(nan):
    assert checked_values([nan, None, 0.5], 3) == [None, None, 0.5]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (None, "list.*got NoneType"),
        (1.0, r"list.*got float \(1.0\)"),
        ("11", "list.*got str"),
        (np.float32(1), "list.*got float"),
        ({0: 1.0}, "list.*got dict"),
        ({1.0, 2.0}, "list.*got set"),
        ([1.0], "each of the 2 completions, got 1"),
        ([1.0, "1.0"], r"value 1 must be a number, True, False or None, got str \('1.0'\)"),
        ([1.0, [1.0]], "value 1 .* got list"),
        ([math.inf, 1.0], "value 0 must be finite in float32, got inf"),
        ([-1e300, 1.0], r"value 0 must be finite in float32, got -1e\+300"),
        ([10**5000, 1.0], "value 0 must be finite in float32, got a whole number"),
    ],
)
def test_other_values_are_refused_with_the_rule(values, rule):
    with pytest.raises(RewardError, match=rule):
        checked_values(values, 2)
