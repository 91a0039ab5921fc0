"""Scores on their way to the learner: one for each update, and none for an update still to come."""

import pytest
from scores import report

from grpo_actors.errors import ProtocolError
from grpo_actors.learner.exchange.evaluations import Evaluations
from grpo_actors.wire.messages import Evaluation, Unscored


def evaluation(update, checkpoint=None):
    return Evaluation(update=update, checkpoint=checkpoint or f"checkpoint-{update}", report=report())


def test_each_update_up_to_the_newest_has_the_first_score_that_arrives_and_it_is_taken_once():
    arrived = Evaluations()
    first, newest = evaluation(1), Unscored(update=2, checkpoint="checkpoint-2", reason="damaged")
    for one in (evaluation(0, "base"), first, newest, evaluation(1), evaluation(2)):
        arrived.add(one, newest_version=2)
    assert [one.update for one in arrived.take()] == [0, 1, 2]
    assert arrived.take() == []
    arrived.add(evaluation(1), newest_version=2)
    assert arrived.take() == [], "it has one, which was taken"


@pytest.mark.parametrize(
    ("claimed", "says"),
    [
        (evaluation(3), "update 2 is the newest, got an evaluation of 3"),
        (evaluation(1, "checkpoint-2"), "the checkpoint of update 1 is checkpoint-1, got 'checkpoint-2'"),
        (evaluation(0, "checkpoint-0"), "the checkpoint of update 0 is base, got 'checkpoint-0'"),
    ],
)
def test_a_score_of_an_update_to_come_or_of_another_checkpoint_is_refused(claimed, says):
    arrived = Evaluations()
    with pytest.raises(ProtocolError, match=says):
        arrived.add(claimed, newest_version=2)
    assert arrived.take() == []
