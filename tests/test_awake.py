from grpo_actors.awake import AwakeClock


def test_a_time_in_which_nobody_looked_does_not_count():
    # Half a second, then an hour of which one second counts, then a quarter: 0.5 + 1 + 0.25.
    times_s = iter([100.0, 100.5, 3700.5, 3700.75])
    clock = AwakeClock(lambda: next(times_s))
    assert [clock(), clock(), clock()] == [0.5, 1.5, 1.75]
