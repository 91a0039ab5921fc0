"""When a child that dies again and again is given up, and what proves nothing."""

from grpo_actors.supervisor.deaths import MAX_DEATHS, MAX_STARTS, Deaths


def died(*deaths, killed=False):
    """Return whether work is given up after each death: (work, how, error)."""
    child = Deaths()
    return [child.repeat(*death, killed=killed) for death in deaths]


ALIKE = [
    ("lease 7", "exit code 1", f"error: no room for {n} bytes at 0x{n:x}") for n in range(17, 17 + MAX_DEATHS)
]
ONE_LESS = [False] * (MAX_DEATHS - 1)


def test_work_is_given_up_when_a_child_has_died_of_it_often_enough_with_one_error():
    assert died(*ALIKE) == [*ONE_LESS, True]


def test_another_work_end_or_error_begins_a_new_count():
    work, how, error = ALIKE[0]
    for other in (("lease 8", how, error), (work, "signal 9", error), (work, how, "error: no tokens")):
        assert died(*ALIKE[1:], other, *ALIKE[1:]) == [*ONE_LESS, False, *ONE_LESS]


def test_a_kill_proves_something_about_work_only():
    assert died(*[("", "signal 9", "")] * (2 * MAX_DEATHS), killed=True) == [False] * (2 * MAX_DEATHS)
    assert died(*[("lease 7", "signal 9", "")] * MAX_DEATHS, killed=True) == [*ONE_LESS, True]
    assert died(*[("", "exit code 1", "")] * MAX_DEATHS) == [*ONE_LESS, True]


def test_a_child_is_given_up_when_enough_starts_in_a_row_came_to_nothing():
    child = Deaths()

    def failed_starts(count):
        return [child.repeat_start(worked=False, killed=False) for _ in range(count)]

    assert failed_starts(MAX_STARTS) == [*[False] * (MAX_STARTS - 1), True]
    assert not child.repeat_start(worked=True, killed=False)
    assert not any(failed_starts(MAX_STARTS - 1))
    assert not child.repeat_start(worked=False, killed=True), "the system may kill any process"
    assert failed_starts(1) == [True]
