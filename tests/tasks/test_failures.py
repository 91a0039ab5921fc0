"""Each kind of failure is reported once, with what is needed to find it."""

from grpo_actors.tasks.failures import (
    ENVIRONMENT,
    MAX_CHARACTERS,
    MAX_KINDS,
    TRACEBACK_LINES,
    Failures,
    summary,
)


def test_a_kind_of_failure_is_reported_once_whatever_its_values_are():
    failures = Failures()
    assert list(failures.new("p1", {"short": "KeyError: 'gold'", ENVIRONMENT: "took more than 3 s"})) == [
        "reward short, problem p1: KeyError: 'gold'",
        "environment, problem p1: took more than 3 s",
    ]
    assert list(failures.new("p2", {"short": "KeyError: 'true'", ENVIRONMENT: "took more than 4 s"})) == []
    other = {"short": "ValueError: 3", "long": "KeyError: 'gold'"}
    assert list(failures.new("p3", other)) == [
        "reward short, problem p3: ValueError: 3",
        "reward long, problem p3: KeyError: 'gold'",
    ]


def test_no_worker_can_report_without_end():
    names = [f"reward {chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(MAX_KINDS + 5)]
    assert len(list(Failures().new("p", dict.fromkeys(names, "why")))) == MAX_KINDS


def test_a_summary_has_the_reason_and_the_end_of_the_traceback():
    lines = [f"line {n}" for n in range(9)]
    assert summary("\n".join(["why", *lines])) == "\n".join(["why", *lines[-TRACEBACK_LINES:]])
    assert summary("why") == "why"
    assert len(summary("x" * 2 * MAX_CHARACTERS)) == MAX_CHARACTERS
