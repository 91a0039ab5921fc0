import os
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_actors.tasks.answers import (
    canonical_answer,
    extract_answer,
    find_answer,
    gsm8k_answer,
    read_number,
    read_quantity,
    same_answer,
)
from grpo_actors.tasks.lines import read_rows


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<reasoning>2+2</reasoning><answer>\n 4 \n</answer>", "4"),
        ("<answer>1</answer> no, wait: <answer>2</answer>", "2"),
        ("<answer>1</answer> and <answer>2", "1"),
        ("I write <answer> and then <answer>3</answer>", "3"),
        ("<answer>3</answer> stray </answer>", "3"),
        ("<answer></answer>", ""),
        ("four", ""),
        ("</answer>4<answer>", ""),
    ],
)
def test_the_last_complete_answer_counts(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    "given", ["1000", "1,000", "1000.0", "$1000", "$1,000.00", "+1000", " 1000 ", "1000.", "01000"]
)
def test_numbers_are_compared_by_value(given):
    assert same_answer(given, "1,000")


@pytest.mark.parametrize(
    ("given", "true"),
    [
        ("-5", "5"),
        ("10,00", "1000"),  # a comma in the wrong place is not a thousands comma
        ("1000 dollars", "1000"),
        ("1e3", "1000"),
        ("0.30000000000000000001", "0.3"),  # equal as floats; compared exactly
        ("1" + "0" * 40 + "1", "1" + "0" * 40 + "2"),  # beyond the 28 digits of decimal's context
        ("", ""),
        ("", "0"),
        ("nan", "NaN"),
        ("yes", "Yes"),
        ("٣", "3"),  # digits of other scripts
    ],
)
def test_what_is_not_the_same_answer(given, true):
    assert not same_answer(given, true)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("1000", "1000"),
        ("$1,000.00", "1000"),
        ("+007.50", "7.5"),
        (".5", "0.5"),
        ("-0.0", "0"),
        ("-5.", "-5"),
        (" Paris\n", "Paris"),
        ("1e3", "1e3"),
        ("1" + "0" * 40 + "1.0", "1" + "0" * 40 + "1"),
        (" ", ""),
    ],
)
def test_an_answer_has_one_plain_form(written, plain):
    assert canonical_answer(written) == plain


@given(*[st.text(alphabet="01.,-+$ x", max_size=6)] * 2)
def test_two_answers_are_the_same_exactly_if_their_plain_forms_are(one, other):
    assert same_answer(one, other) == (canonical_answer(one) == canonical_answer(other) != "")


def test_text_is_compared_exactly_after_stripping():
    assert same_answer(" Paris\n", "Paris")


@pytest.mark.parametrize("given", ["-$5", "$-5", "-5", "-5.0"])
def test_a_minus_may_stand_on_either_side_of_the_dollar_sign(given):
    assert read_number(given) == Decimal(-5)


@pytest.mark.parametrize("text", ["", "-", ".", "$", "--5", "1.2.3", "5%"])
def test_what_is_not_a_number(text):
    assert read_number(text) is None


def test_the_answer_of_a_solution_follows_four_hashes():
    assert gsm8k_answer("2+2 = <<2+2=4>>4\n#### 4") == "4"
    assert gsm8k_answer("no answer") == ""


@pytest.mark.parametrize("hostile", ["<answer>" * 125_000, "9" * 1_000_000, "<answer>" + "1," * 500_000])
def test_a_megabyte_of_hostile_text_costs_less_than_a_second(hostile):
    start_s = time.process_time()
    assert not same_answer(extract_answer(hostile), "1")
    assert not same_answer(hostile, "1")
    assert not same_answer("1", hostile)
    assert time.process_time() - start_s < 1


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("so it is **73**", ("73", "bold")),
        ("**Step 1:** 70 + 3 makes **73 apples**, **done**", ("73 apples", "bold")),
        (r"so it is \boxed{42}", ("42", "boxed")),
        (r"\boxed{1}, no, \boxed{\frac{1}{2}}", (r"\frac{1}{2}", "boxed")),
        (r"**1** or \boxed{2}", ("2", "boxed")),
        (r"<answer>1</answer> or \boxed{2}", ("1", "tags")),
        (r"\boxed{", ("", "")),
        ("**seven**", ("", "")),
        ("73", ("", "")),
    ],
)
def test_mathematics_may_be_boxed_or_bold_and_tags_come_first(completion, found):
    assert find_answer(completion, mathematics=True) == found
    assert find_answer(completion).parser in ("tags", "")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[
            (form, "73")
            for form in ("73", "**73**", "$73$", "73 apples", "73.", "x = 73", "Answer: 73", "73%")
        ],
        *[
            (form, "1234")
            for form in ("1,234", "1 234", "1{,}234", r"1\,234", "1'234", "$1,234.00", "1234 km/h")
        ],
        (r"\boxed{1{,}234\text{ apples}}", "1234"),
        (r"42\,\text{cm}", "42"),
        (r"\(42^\circ\)", "42"),
        ("-5 °C", "-5"),
        ("5 m^2", "5"),
        ("€7.50", "7.5"),
        ("18 eggs per day", "18"),
    ],
)
def test_a_quantity_is_its_number_without_unit_and_separators(written, value):
    assert read_quantity(written) == Decimal(value)
    assert same_answer(written, value, mathematics=True)
    assert canonical_answer(written, mathematics=True) == value


@pytest.mark.parametrize(
    "text",
    ["2x", "5k", "42 million", "3 dozen", "4 or 5", "1/2", "3:4", "12 34", "10,00", "about 5", "", "**"],
)
def test_what_is_no_quantity(text):
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    "hostile",
    [r"\boxed{" * 150_000, "**1" * 300_000, "**a" * 300_000, r"\boxed{{}" * 100_000, r"\boxed" + " " * 10**6],
)
def test_a_megabyte_of_hostile_mathematics_is_read_in_linear_time(hostile):
    start = time.process_time()
    find_answer(hostile, mathematics=True)
    assert time.process_time() - start < 5


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="GSM8K_DIR names no folder with GSM8K")
@pytest.mark.parametrize(("file", "count"), [("train.jsonl", 7473), ("test.jsonl", 1319)])
def test_every_answer_of_gsm8k_is_a_number(file, count):
    answers = [gsm8k_answer(row["answer"]) for _, row in read_rows(Path(os.environ["GSM8K_DIR"]) / file)]
    assert len(answers) == count
    assert [answer for answer in answers if read_number(answer) is None] == []
