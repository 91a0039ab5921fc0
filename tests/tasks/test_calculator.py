"""The calculator: exact values, a bounded language, and errors as text that the policy can read."""

import pytest

from grpo_actors.tasks.calculator import MAX_CHARACTERS, calculate, calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        (" 2 + 3 * 4 ", "14"),
        ("(2+3)*4", "20"),
        ("-(3-10)", "7"),
        ("1/3*3", "1"),  # a fraction of whole numbers is exact
        ("0.1+0.2", "0.3"),
        ("10/4", "2.5"),
        ("2/3", "0.6666666667"),
    ],
)
def test_an_expression_has_its_value(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("1/0", "division by zero"),
        ("1/(2-2)", "division by zero"),
        ("", "not an expression"),
        ("1+", "not an expression"),
        ("2**9", "not an expression"),
        ("7//2", "not an expression"),
        ("()", "not an expression"),
        ("...", "not an expression"),
        ("3(4)", "not an expression"),
        ("x+1", "only numbers"),
        ("__import__('os')", "only numbers"),
        ("1e9", "only numbers"),
        ("1\n2", "only numbers"),
        ("9" * 16, "too large"),
        ("1+" * MAX_CHARACTERS + "1", f"longer than {MAX_CHARACTERS} characters"),
    ],
)
def test_what_is_no_expression_is_an_error_in_words(expression, error):
    assert calculate(expression).startswith(f"error: {error}")


@pytest.mark.parametrize("unit", ["(", "-", "9*", "9/", "-(", "1.5*"])
def test_the_deepest_and_longest_expressions_within_the_bound_get_a_reply(unit):
    worst = (unit * MAX_CHARACTERS)[: MAX_CHARACTERS - 1] + "9"
    assert not calculate(worst).startswith("error: longer")


def said(*texts):
    return [{"role": "user", "content": "?"}, *({"role": "assistant", "content": text} for text in texts)]


def test_the_last_call_of_the_last_turn_is_answered():
    assert calculator(said("<tool>1+1</tool> or <tool>2+2</tool>"), "4") == "4"


def test_a_turn_without_a_call_ends_the_completion():
    assert calculator(said("<tool>1+1</tool>", "It is <answer>2</answer>"), "2") is None
    assert calculator(said("<tool>1+1"), "2") is None
