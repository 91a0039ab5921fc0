from collections import Counter

import pytest

from grpo_actors.schedule.mixture import MixtureOrder, turns_of
from grpo_actors.schedule.order import Position


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ((1.0, 1.0, 1.0), (1, 1, 1)),
        ((0.5, 0.3, 0.2), (5, 3, 2)),
        ((2.0, 1.0), (667, 333)),
        ((1.0, 1e-9), (1000, 1)),  # none is left out
    ],
)
def test_turns_have_the_ratio_of_the_weights(weights, turns):
    assert turns_of(weights) == turns


def sources(order, positions):
    bounds = [sum(order.counts[: n + 1]) for n in range(len(order.counts))]
    return [next(n for n, bound in enumerate(bounds) if order.at(p).index < bound) for p in positions]


def test_every_stretch_has_its_share_of_each_source():
    order = MixtureOrder(counts=(7, 100, 13), turns=(5, 3, 2), seed=1)
    seen = Counter()
    for position, source in enumerate(sources(order, range(500)), start=1):
        seen[source] += 1
        for each, turns in enumerate(order.turns):
            # Never a whole turn ahead or behind, by more than the three sources that may come first.
            assert abs(seen[each] - position * turns / 10) < 2


def test_the_turns_of_a_source_are_spread_evenly_over_a_block():
    # Turn t of n comes at (2 t + 1) / 2 n. In 1/30: 3, 9, 15, 21, 27 of the first, and 5, 15, 25 of the second source.
    order = MixtureOrder(counts=(5, 3), turns=(5, 3), seed=1)
    assert sources(order, range(8)) == [0, 1, 0, 0, 1, 0, 1, 0]


def test_a_source_poses_each_of_its_problems_once_in_each_of_its_epochs():
    order = MixtureOrder(counts=(3, 8), turns=(1, 1), seed=5)
    at = [
        order.at(position) for position in range(48)
    ]  # 24 turns each: 8 epochs of the first, 3 of the second
    first, second = ([p for p in at if (p.index < 3) == is_first] for is_first in (True, False))
    assert Counter((p.epoch, p.index) for p in first) == Counter((e, i) for e in range(8) for i in range(3))
    assert Counter((p.epoch, p.index) for p in second) == Counter(
        (e, 3 + i) for e in range(3) for i in range(8)
    )
    assert len({tuple(p.index for p in second if p.epoch == e) for e in range(3)}) == 3, (
        "another order each epoch"
    )


def test_a_position_depends_on_no_other_position():
    def order():
        return MixtureOrder(counts=(11, 5), turns=(2, 3), seed=9)

    forward = [order().at(position) for position in range(60)]
    again = order()
    assert [again.at(position) for position in reversed(range(60))] == forward[::-1]


def test_the_order_of_equal_sources_differs_and_without_shuffle_it_is_that_of_the_data():
    order = MixtureOrder(counts=(20, 20), turns=(1, 1), seed=3)
    first = [order.at(position).index for position in range(0, 40, 2)]
    second = [order.at(position).index - 20 for position in range(1, 40, 2)]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    plain = MixtureOrder(counts=(2, 3), turns=(1, 1), seed=3, shuffle=False)
    assert [plain.at(position) for position in range(6)] == [
        Position(0, 0),
        Position(0, 2),
        Position(0, 1),
        Position(0, 3),
        Position(1, 0),
        Position(0, 4),
    ]


def test_turns_as_many_as_problems_make_an_epoch_of_all():
    order = MixtureOrder(counts=(4, 6), turns=(4, 6), seed=0)
    for epoch in range(3):
        at = [order.at(position) for position in range(10 * epoch, 10 * epoch + 10)]
        assert {p.epoch for p in at} == {epoch}
        assert sorted(p.index for p in at) == list(range(10))
