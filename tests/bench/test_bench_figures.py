"""Figures in the table and in the JSON."""

import json

from grpo_actors import __version__
from grpo_actors.bench.figures import Figure, as_json, as_table

TIME = Figure("step ms", [6.0, 2.0, 4.0], floor=2.0)
RATE = Figure("tokens/s", [500.0], floor=2000.0, is_rate=True)
PLAIN = Figure("rows", [64])


def test_times_and_rates_are_compared_with_the_floors_time():
    assert (TIME.median, TIME.times_floor) == (4.0, 2.0)
    assert RATE.times_floor == 4.0
    assert PLAIN.times_floor is None


def test_the_table_has_a_line_for_the_machine_one_for_the_columns_and_one_for_each_figure():
    machine, columns, *rows = as_table([TIME, RATE, PLAIN], {"device": "X (CPU)", "cores": 2}).splitlines()
    assert machine == "device X (CPU), cores 2"
    assert columns.split() == ["what", "median", "min–max", "floor", "×", "floor"]
    assert [row.split()[-1] for row in rows] == ["2.0", "4.0", "64–64"]


def test_the_json_has_every_round():
    document = json.loads(as_json([TIME], {"device": "X"}, {"rounds": 3}))
    assert document["version"] == __version__
    assert document["parameters"] == {"rounds": 3}
    assert document["figures"]["step ms"] == {
        "median": 4.0,
        "min": 2.0,
        "max": 6.0,
        "values": [6.0, 2.0, 4.0],
        "floor": 2.0,
        "times_floor": 2.0,
    }
