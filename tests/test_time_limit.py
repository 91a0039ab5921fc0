"""Code of others has a limit, in seconds that pass or in seconds of computing; a timer that ran before goes on."""

import signal
import time

import pytest
from bounds import HANG_S

from grpo_actors.time_limit import time_limit


def compute_until_ended():
    while True:
        pass


@pytest.mark.parametrize("of_computing", [False, True])
def test_code_that_does_not_end_is_left_at_the_limit(of_computing):
    clock = time.process_time if of_computing else time.monotonic
    began_s = clock()
    with pytest.raises(TimeoutError), time_limit(0.05, of_computing=of_computing):
        compute_until_ended()
    # Linux counts computing in ticks of up to 10 ms, each for whoever computes at its end.
    assert clock() - began_s >= (0.02 if of_computing else 0.05)


def test_a_library_that_catches_exceptions_does_not_catch_the_limit():
    def library():
        try:
            compute_until_ended()
        except Exception:  # noqa: BLE001 - what a library does
            pytest.fail("it went on")

    with pytest.raises(TimeoutError), time_limit(0.05):
        library()


def test_a_wait_is_no_computing():
    with time_limit(0.05, of_computing=True):
        time.sleep(0.1)  # twice the limit pass


def test_without_computing_the_limit_is_of_the_time_that_passes():
    with pytest.raises(TimeoutError), time_limit(0.05):
        time.sleep(HANG_S)


@pytest.mark.parametrize(
    ("of_computing", "timer", "number"),
    [(False, signal.ITIMER_REAL, signal.SIGALRM), (True, signal.ITIMER_PROF, signal.SIGPROF)],
)
def test_afterwards_neither_timer_nor_handler_is_left(of_computing, timer, number):
    before = signal.getsignal(number)
    with time_limit(HANG_S, of_computing=of_computing):
        assert signal.getitimer(timer)[0] > 0
    assert signal.getitimer(timer) == (0.0, 0.0)
    assert signal.getsignal(number) is before


def test_a_timer_that_ran_before_goes_on_with_what_is_left_of_it():
    rung = []
    former = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        with time_limit(HANG_S / 2):
            time.sleep(0.05)
        left_s = signal.getitimer(signal.ITIMER_REAL)[0]
        assert HANG_S / 2 < left_s < HANG_S - 0.04, "the seconds within the block count"

        signal.setitimer(signal.ITIMER_REAL, 0.05)
        began_s = time.monotonic()
        with time_limit(HANG_S):
            time.sleep(0.1)  # the outer timer would have rung meanwhile
        while not rung:
            assert time.monotonic() - began_s < HANG_S, "it rings as soon as the block is left"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
