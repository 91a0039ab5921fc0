"""A checkpoint that the evaluator cannot score: the learner does not wait for its score."""

import uuid

from hand_made import RecordList, config, groups_of, learner

from grpo_actors.learner.archive import Archive
from grpo_actors.wire.messages import Unscored


def test_no_score_is_awaited_and_the_reason_is_recorded_once(tmp_path):
    settings = config()
    assert settings.evaluator.eval_every_updates
    archive, grpo, records = Archive(tmp_path, settings, uuid.uuid4().hex), learner(settings), RecordList()
    grpo.update(groups_of(grpo.policy))
    archive.save(records, grpo)
    archive.collect(records, wait=True)
    assert archive.unevaluated() == {1}
    unscored = Unscored(update=1, checkpoint="checkpoint-1", reason="model.safetensors is damaged")
    for _ in range(2):
        archive.take_evaluations(records, [unscored])
    assert archive.unevaluated() == set()
    texts = [fields["text"] for topic, fields in records.records if topic == "log"]
    assert texts == ["checkpoint-1 has no score: model.safetensors is damaged"]
