"""The curriculum: how often each problem is posed, and that the search for one ends."""

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_actors.schedule.curriculum import Curriculum

rates = st.floats(0, 1)
floors = st.floats(0.01, 1)


def test_an_unknown_problem_is_always_posed():
    curriculum = Curriculum(seed=1, floor=0.01)
    assert all(curriculum.poses(epoch, f"p{n}") for epoch in range(20) for n in range(20))


@pytest.mark.parametrize(
    ("rate", "share"),
    # max(1/4, 4 p (1 - p)): 4 · 1/2 · 1/2 = 1, 4 · 1/8 · 7/8 = 7/16, and the floor.
    [(0.5, 1.0), (0.125, 7 / 16), (0.875, 7 / 16), (0.0, 0.25), (1.0, 0.25)],
)
def test_a_problem_is_posed_in_the_share_of_epochs_that_its_rate_gives(rate, share):
    curriculum = Curriculum(seed=1, floor=0.25, rates={"p": rate})
    assert sum(curriculum.poses(epoch, "p") for epoch in range(160)) == share * 160


@given(seed=st.integers(0, 2**63), rate=rates, floor=floors, first=st.integers(0, 10**6))
def test_no_problem_is_skipped_for_longer_than_the_floor_allows(seed, rate, floor, first):
    curriculum = Curriculum(seed, floor, {"p": rate})
    chance = max(floor, 4 * rate * (1 - rate))
    assert any(curriculum.poses(epoch, "p") for epoch in range(first, first + ceil(1 / chance)))


def test_problems_take_turns_within_an_epoch():
    # 400 problems with a chance of 1/4 each: their phases spread them over the epochs. 100 ± 5 standard deviations.
    curriculum = Curriculum(seed=1, floor=0.25, rates={f"p{n}": 0.0 for n in range(400)})
    for epoch in range(1, 5):
        assert 57 < sum(curriculum.poses(epoch, f"p{n}") for n in range(400)) < 143


def test_a_rate_is_an_exponential_mean():
    curriculum = Curriculum(seed=1, floor=0.25)
    curriculum.record("p", 0.5)
    assert curriculum.rates == {"p": 0.5}
    curriculum.record("p", 1.0)  # 0.5 + (1 - 0.5) / 2
    assert curriculum.rates == {"p": 0.75}
