"""What a learner finds again in its checkpoints when its settings have changed in between."""

import uuid

import numpy as np
import pytest
from hand_made import assert_same_weights, config, groups_of, learner

from grpo_actors.learner.archive import Archive
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.schedule.lease import Cursor


class RecordList:
    """Keeps records in memory."""

    def __init__(self):
        self.told = []

    def record(self, topic, **fields):
        self.told.append((topic, fields))

    def snapshot(self):
        return Snapshot(Cursor(), len(self.told))


def continued(folder, settings):
    """A new learner that goes on from the newest checkpoint of a folder, and its archive."""
    archive, grpo = Archive(folder, settings, uuid.uuid4().hex), learner(settings)
    archive.restore(grpo)
    return archive, grpo


def reference_of(grpo):
    return {name: np.array(array) for name, array in grpo.reference.items()}


@pytest.mark.parametrize("refresh", [1, 0])
def test_a_reference_that_has_moved_stays_with_the_run_also_where_it_is_refreshed_no_more(tmp_path, refresh):
    moving = config(kl_coeff=0.1, reference_refresh_updates=1, reference_refresh_alpha=0.5)
    archive, grpo = continued(tmp_path, moving)
    start, groups = reference_of(grpo), groups_of(grpo.policy)
    grpo.update(groups)
    archive.save(RecordList(), grpo)

    later = config(kl_coeff=0.1, reference_refresh_updates=refresh, reference_refresh_alpha=0.5)
    archive, second = continued(tmp_path, later)
    assert_same_weights(reference_of(grpo), reference_of(second))
    second.update(groups)
    archive.save(RecordList(), second)

    _, third = continued(tmp_path, later)
    assert_same_weights(reference_of(second), reference_of(third))
    assert any((start[name] != array).any() for name, array in reference_of(third).items())


def test_a_reference_that_has_not_moved_is_not_written(tmp_path):
    archive, grpo = continued(tmp_path, config(kl_coeff=0.1, reference_refresh_updates=2))
    grpo.update(groups_of(grpo.policy))
    archive.save(RecordList(), grpo)
    assert not (tmp_path / "checkpoint-1" / "reference.safetensors").exists()


def test_without_a_kl_term_no_reference_is_kept_whatever_the_checkpoint_has(tmp_path):
    archive, grpo = continued(tmp_path, config(kl_coeff=0.1, reference_refresh_updates=1))
    groups = groups_of(grpo.policy)
    grpo.update(groups)
    archive.save(RecordList(), grpo)
    _, second = continued(tmp_path, config(kl_coeff=0.0, reference_refresh_updates=1))
    assert second.reference is None
    assert second.update(groups)["kl"] is None
