"""Which errors mean that there is no memory, and what a user is told."""

import pytest

from grpo_actors.errors import DataError
from grpo_actors.out_of_memory import CURES, is_out_of_memory, refusal, role_of, says_out_of_memory


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),  # without a word
        (RuntimeError("Out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError(), False),
        (caused(ValueError("x"), MemoryError()), True),
        (caused(ValueError("x"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")), True),
        (caused(ValueError("x"), ValueError("y")), False),
        (caused(RuntimeError("out of memory"), ValueError("y")), True),
        # The text of an own error may quote anything, but not that of its cause.
        (DataError("the answer is 'out of memory'"), False),
        (caused(DataError("not loaded"), RuntimeError("out of memory")), True),
    ],
)
def test_an_error_or_its_cause_says_so(error, is_one):
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("std::bad_alloc", True),
        ("cudaErrorMemoryAllocation: out_of_memory", True),
        ("Insufficient Memory", True),
        ("[malloc] Unable to allocate 8 bytes", True),
        ("memory is out of date", False),
        ("", False),
    ],
)
def test_a_line_says_so_in_the_words_of_some_library(text, says):
    assert says_out_of_memory(text) is says


@pytest.mark.parametrize(
    ("name", "role"),
    [("learner", "learner"), ("evaluator", "evaluator"), ("rollout-0", "worker"), ("rollout-12", "worker")],
)
def test_each_process_has_a_role_and_each_role_its_own_cure(name, role):
    assert role_of(name) == role
    line = refusal(RuntimeError("no memory\nat x.cpp:3"), role)
    assert line.startswith(f"out of memory (no memory); {CURES[role]}; ")
    assert line.endswith(" train --dry-run shows what each process needs")
    assert len(set(CURES.values())) == 3
