"""What a learner restores from its checkpoints after its settings have changed."""

import uuid

import numpy as np
import pytest
from hand_made import RecordList, assert_same_weights, config, groups_of, learner

from grpo_actors.learner.archive import Archive


def save(archive, grpo):
    """Write a checkpoint and wait for it."""
    records = RecordList()
    archive.save(records, grpo)
    archive.collect(records, wait=True)


def continued(folder, settings):
    """Return a new learner that continues from the newest checkpoint of a folder, with its archive."""
    archive, grpo = Archive(folder, settings, uuid.uuid4().hex), learner(settings)
    archive.restore(grpo)
    return archive, grpo


def reference_of(grpo):
    return {name: np.array(array) for name, array in grpo.reference.items()}


@pytest.mark.parametrize("refresh", [1, 0])
def test_a_refreshed_reference_stays_with_the_run_even_if_it_is_no_longer_refreshed(tmp_path, refresh):
    moving = config(kl_coeff=0.1, reference_refresh_updates=1, reference_refresh_alpha=0.5)
    archive, grpo = continued(tmp_path, moving)
    start, groups = reference_of(grpo), groups_of(grpo.policy)
    grpo.update(groups)
    save(archive, grpo)

    later = config(kl_coeff=0.1, reference_refresh_updates=refresh, reference_refresh_alpha=0.5)
    archive, second = continued(tmp_path, later)
    assert_same_weights(reference_of(grpo), reference_of(second))
    second.update(groups)
    save(archive, second)

    _, third = continued(tmp_path, later)
    assert_same_weights(reference_of(second), reference_of(third))
    assert any((start[name] != array).any() for name, array in reference_of(third).items())


def test_a_reference_that_was_never_refreshed_is_not_written(tmp_path):
    archive, grpo = continued(tmp_path, config(kl_coeff=0.1, reference_refresh_updates=2))
    grpo.update(groups_of(grpo.policy))
    save(archive, grpo)
    assert not (tmp_path / "checkpoint-1" / "reference.safetensors").exists()


def test_without_a_kl_term_no_reference_is_kept_even_if_the_checkpoint_has_one(tmp_path):
    archive, grpo = continued(tmp_path, config(kl_coeff=0.1, reference_refresh_updates=1))
    groups = groups_of(grpo.policy)
    grpo.update(groups)
    save(archive, grpo)
    _, second = continued(tmp_path, config(kl_coeff=0.0, reference_refresh_updates=1))
    assert second.reference is None
    assert second.update(groups)["kl"] is None
