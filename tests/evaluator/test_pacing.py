"""Steps of an evaluation that leaves an accelerator to training, on a clock of its own."""

from grpo_actors.evaluator.pacing import MEASURED, PACED, Pacing


class Machine:
    """A clock that moves when something computes or sleeps."""

    def __init__(self):
        self.now_s = 100.0
        self.pauses = []

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now_s += seconds


def paced(step_s, steps):
    """Return the machine after `steps` steps; `step_s` gives the length of each."""
    machine = Machine()
    pacing = Pacing(lambda: machine.now_s, machine.sleep)
    for step in range(steps):
        machine.now_s += step_s(step)
        pacing.pause()
    return machine


def test_after_some_steps_at_full_speed_each_takes_twice_its_time():
    assert paced(lambda _: 0.25, MEASURED).pauses == []
    machine = paced(lambda _: 0.25, MEASURED + PACED)
    assert machine.pauses == [0.25] * PACED
    assert machine.now_s == 100 + 0.25 * MEASURED + 0.5 * PACED


def test_the_shortest_measured_step_counts_except_the_first_which_follows_a_pause():
    # 0 s after a pause; two that waited for training, one that did not.
    lengths = [0.0, 1.0, 0.25, 0.5]
    machine = paced(lambda step: lengths[step] if step < MEASURED else 0.125, MEASURED + 1)
    assert machine.pauses == [0.375]  # 2 × 0.25 − 0.125


def test_a_step_that_took_twice_its_time_anyway_is_followed_by_no_pause():
    assert paced(lambda step: 0.25 if step < MEASURED else 0.75, MEASURED + 5).pauses == []


def test_the_length_is_measured_anew():
    faster_from = MEASURED + PACED
    machine = paced(lambda step: 0.5 if step < faster_from else 0.125, faster_from + MEASURED + 1)
    assert machine.pauses == [0.5] * PACED + [0.125]
