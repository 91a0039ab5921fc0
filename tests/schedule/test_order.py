"""The order of problems and the seeds of their samples, against fixed values and as properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_actors.schedule.order import Position, ProblemOrder, sample_seeds


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    order = ProblemOrder(count=7, seed=11)
    indices = [order.at(position).index for position in range(14)]
    # Written down once, from Python's own shuffle of range(7) with the keys "11/0" and "11/1".
    assert indices == [3, 4, 6, 1, 5, 2, 0, 1, 0, 6, 2, 3, 5, 4]


def test_the_seeds_are_the_same_on_every_machine_and_in_every_version():
    # xxh3-64 of "5/2/gsm8k/17/0" and "5/2/gsm8k/17/1", as the xxhash library gives them.
    assert sample_seeds(5, 2, "gsm8k/17", 2) == [17717397432524196552, 18265409379901957959]


@given(count=st.integers(1, 200), seed=st.integers(0, 2**32), epoch=st.integers(0, 5), shuffle=st.booleans())
def test_each_epoch_holds_every_problem_once(count, seed, epoch, shuffle):
    order = ProblemOrder(count, seed, shuffle)
    positions = [order.at(epoch * count + offset) for offset in range(count)]
    assert {position.epoch for position in positions} == {epoch}
    assert sorted(position.index for position in positions) == list(range(count))


def test_epochs_and_seeds_shuffle_differently():
    orders = {
        tuple(ProblemOrder(50, seed).at(epoch * 50 + offset).index for offset in range(50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_without_shuffling_the_data_keeps_its_order():
    order = ProblemOrder(count=3, seed=1, shuffle=False)
    assert [order.at(p) for p in (0, 2, 3, 7)] == [
        Position(0, 0),
        Position(0, 2),
        Position(1, 0),
        Position(2, 1),
    ]


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30))
@settings(max_examples=30)
def test_a_position_does_not_depend_on_what_was_asked_before(positions):
    fresh = {position: ProblemOrder(40, 3).at(position) for position in sorted(positions)}
    order = ProblemOrder(40, 3)
    assert all(order.at(position) == fresh[position] for position in positions)


@pytest.mark.parametrize("change", [(6, 2, "p"), (5, 3, "p"), (5, 2, "q")])
def test_seeds_differ_by_run_epoch_problem_and_sample(change):
    seeds = [*sample_seeds(5, 2, "p", 100), *sample_seeds(*change, 100)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_more_samples_leave_the_first_ones_as_they_are():
    assert sample_seeds(5, 2, "p", 8)[:4] == sample_seeds(5, 2, "p", 4)
