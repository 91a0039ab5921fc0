"""What a learner restores from its checkpoints after its settings have changed."""

import time
import uuid

import numpy as np
import pytest
from hand_made import RecordList, assert_same_weights, config, groups_of, learner
from scores import score

from grpo_actors.errors import RunError
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


def test_the_base_model_gets_no_checkpoint_and_an_update_one(tmp_path):
    archive, grpo = continued(tmp_path, config())
    records, began_s = RecordList(), time.monotonic()
    for version in (0, 1, 1, 2):
        grpo.version = version
        archive.save(records, grpo)
    archive.collect(records, wait=True)
    took_s = time.monotonic() - began_s
    assert records.updates("checkpoint") == [1, 2]
    waits_s = [fields["wait_s"] for _, fields in records.records]
    assert 0.0 < min(waits_s) <= sum(waits_s) <= took_s
    # Nor does a resumed run write once more what it resumes from.
    archive, grpo = continued(tmp_path, config())
    archive.save(records, grpo)
    archive.collect(records, wait=True)
    assert records.updates("checkpoint") == [1, 2]


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


def flip(path):
    """Damage a file: change its last bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_same_checkpoints_damaged_again_and_again_are_passed_over_loudly_each_time(tmp_path):
    settings = config()
    grpo = learner(settings)
    for update in (1, 2, 3):
        grpo.version = update
        save(Archive(tmp_path, settings, "r"), grpo)
    for times in (1, 2, 3):
        for update in (2, 3):
            flip(tmp_path / f"checkpoint-{update}" / "model.safetensors")
        archive, grpo = continued(tmp_path, settings)
        records = RecordList()
        archive.announce(records)
        assert archive.update == 1
        alarms = [fields["text"] for topic, fields in records.records if topic == "alarm"]
        assert len(alarms) == 2
        assert all("not the file that was written" in text for text in alarms)
        suffix = ".damaged" if times == 1 else f".damaged-{times}"
        moved = [fields["text"].rpartition(" ")[2] for topic, fields in records.records if topic == "log"]
        assert moved == [f"checkpoint-2{suffix}", f"checkpoint-3{suffix}"]
        assert {path for path in names(tmp_path) if ".damaged" not in path} == {"checkpoint-1"}
        for update in (2, 3):
            grpo.version = update
            save(archive, grpo)
    assert len(names(tmp_path)) == 3 + 3 * 2


def test_a_folder_called_checkpoint_without_a_manifest_is_moved_out_of_the_way_and_not_deleted(tmp_path):
    settings = config()
    grpo = learner(settings)
    grpo.version = 1
    save(Archive(tmp_path, settings, "r"), grpo)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "mine").touch()
    archive, grpo = continued(tmp_path, settings)
    archive.announce(RecordList())
    assert (tmp_path / "checkpoint-2.damaged" / "mine").exists()


SCORE = score(0.5).model_dump_json()
EVAL = f'{{"seq":2,"time":1,"topic":"eval","update":1,"score":{SCORE}}}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ", line 2: a record must be one JSON object ("),
        ("[]", ", line 2: "),
        ('{"seq": "2", "time": 1, "topic": "eval"}', ", line 2: "),
        (EVAL.replace('"update":1,', ""), ": record 2 must have update and score"),
        (EVAL.replace("0.5", '"half"'), ": record 2 must have update and score"),
    ],
)
def test_a_bad_line_in_the_records_is_one_line_that_names_file_and_cure(tmp_path, line, says):
    settings = config()
    grpo = learner(settings)
    grpo.version = 1
    archive, records = Archive(tmp_path, settings, "r"), RecordList()
    records.records = [("start", {})] * 5
    archive.save(records, grpo)
    archive.collect(records, wait=True)
    (tmp_path / "metrics.jsonl").write_text(f'{{"seq":1,"time":1,"topic":"start"}}\n{line}\n{EVAL}\n')
    with pytest.raises(RunError) as caught:
        Archive(tmp_path, settings, "r")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'metrics.jsonl'}{says}")
    assert text.endswith("move the file away to resume without it")
    assert "\n" not in text
