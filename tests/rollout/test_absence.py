"""How a worker waits for a learner that is gone."""

import math

import pytest

from grpo_actors.errors import RunError
from grpo_actors.rollout.absence import Absence, Place
from grpo_actors.transport.keys import ClientKey

HERE, THERE = Place("ipc:///here"), Place("ipc:///there")


def looks(gone_s, find, patience_s=math.inf):
    """Ask `find` as `Absence` does while these times pass; return at which of them it asked."""
    now, asked = 0.0, []

    def found():
        asked.append(now)
        return find()

    absence = Absence(found, HERE, patience_s)
    for now in gone_s:
        absence.look(now)
    return asked


def nobody():
    raise RunError("no run is live")


def test_it_looks_rarely_and_more_rarely_but_at_least_every_half_minute():
    assert looks(range(130), nobody) == [2, 4, 8, 16, 32, 62, 92, 122]


def test_an_absence_is_told_at_its_beginning_and_at_its_end(capsys):
    looks([0, 1, 2, 3, 4, 60, 1, 0, 2, 1], nobody)
    assert capsys.readouterr().err.splitlines() == ["the learner is gone; waiting", "the learner is back"] * 2


def test_a_learner_that_answers_is_not_looked_for_and_another_absence_begins_anew():
    assert looks([0, 1, 2, 3, 0, 1, 2, 3, 4], nobody) == [2, 2, 4]


def test_a_learner_that_listens_elsewhere_is_noticed(capsys):
    absence = Absence(lambda: THERE, HERE, 600.0)
    assert [absence.look(gone_s) for gone_s in (0.0, 1.9, 2.0)] == [None, None, THERE]
    assert capsys.readouterr().err == "the learner is gone; waiting for up to 600 s (--patience)\n"


def test_a_learner_at_the_same_address_with_another_key_is_noticed():
    old, new = (Place("tcp://127.0.0.1:7000", ClientKey.make("run", "run", "L" * 40)) for _ in range(2))
    assert Absence(lambda: old, old, 600.0).find_other() is None
    assert Absence(lambda: new, old, 600.0).find_other() is new


def test_patience_ends_and_without_a_limit_it_does_not():
    with pytest.raises(RunError, match="the learner has been gone for 600 s"):
        looks([600, 601], nobody, patience_s=600.0)
    assert looks([600], nobody, patience_s=600.0) == [600]
    assert looks([1e9], nobody)
