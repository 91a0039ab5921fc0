"""What an archive reads from a run folder's files and marks there, without a model."""

import json

import pytest
from checkpoint_files import write_checkpoint_files
from hand_made import RecordList

from grpo_actors.config import Config
from grpo_actors.errors import RunError
from grpo_actors.learner.archive import Archive
from grpo_actors.rundir.checkpoints import mark_best
from grpo_actors.wire.messages import Evaluation


def write_records(run_dir, *records):
    lines = [json.dumps({"seq": seq, "time": 0.0} | record) + "\n" for seq, record in enumerate(records, 1)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def evaluated(update, accuracy, sampled=None):
    return {"topic": "eval", "update": update, "accuracy": accuracy, "sampled_accuracy": sampled}


def archive_in(run_dir, *, save_steps=2, eval_every_updates=1):
    settings = {"run": {"save_steps": save_steps}, "evaluator": {"eval_every_updates": eval_every_updates}}
    return Archive(run_dir, Config.model_validate(settings), "new")


def best(run_dir):
    """Return (update, accuracy) of best.json; None if there is none."""
    path = run_dir / "best.json"
    if not path.exists():
        return None
    marked = json.loads(path.read_text())
    assert marked["checkpoint"] == f"checkpoint-{marked['update']}"
    return marked["update"], marked["accuracy"]


def score(update, accuracy, sampled=None):
    return Evaluation(
        update=update,
        checkpoint=f"checkpoint-{update}",
        samples=4,
        accuracy=accuracy,
        accuracy_low=0.0,
        accuracy_high=1.0,
        sampled_accuracy=sampled,
        rewards={},
        completion_length_mean=3.0,
        truncated_share=0.0,
        seconds=1.0,
    )


def scored(run_dir, *scores):
    """Return whether each score was recorded as the best, and the mark at the end."""
    records = RecordList()
    archive = archive_in(run_dir)
    for one in scores:
        archive.take_evaluations(records, [one])
    return [fields["best"] for _, fields in records.records], best(run_dir)


def test_only_a_better_score_marks_a_new_best(tmp_path):
    assert scored(tmp_path, score(1, 0.5), score(2, 0.25), score(3, 0.5), score(4, 0.75), score(5, 0.5)) == (
        [True, False, False, True, False],
        (4, 0.75),
    )


def test_sampled_accuracy_decides_where_it_was_measured(tmp_path):
    assert scored(tmp_path, score(1, 0.2, 0.5), score(2, 0.9, 0.25)) == ([True, False], (1, 0.5))


def test_the_base_model_is_never_marked_as_the_best_checkpoint(tmp_path):
    assert scored(tmp_path, score(0, 0.9)) == ([True], None)


def test_the_score_of_the_best_that_comes_again_after_a_resume_is_its_score(tmp_path):
    mark_best(tmp_path, 1, 0.5)
    assert scored(tmp_path, score(1, 0.4)) == ([True], (1, 0.4))


def test_if_all_checkpoints_are_damaged_the_run_does_not_start_over(tmp_path):
    for update in (1, 2):
        write_checkpoint_files(tmp_path, update)
        (tmp_path / f"checkpoint-{update}" / "state.json").write_text("{")
    with pytest.raises(RunError, match=r"checkpoint-2.*no other checkpoint is sound"):
        archive_in(tmp_path)


def test_without_a_checkpoint_a_run_begins_and_with_one_it_keeps_its_id(tmp_path):
    new = archive_in(tmp_path)
    assert (new.update, new.records, new.run_id, new.resumed) == (0, 0, "new", None)
    assert (new.cursor.position, new.success_rates) == (0, {})
    write_checkpoint_files(
        tmp_path,
        3,
        run_id="first",
        records=7,
        cursor={"position": 6, "set_aside": [8]},
        success_rates={"p": 0.5},
    )
    resumed = archive_in(tmp_path)
    assert (resumed.update, resumed.records, resumed.run_id) == (3, 7, "first")
    assert (resumed.cursor.position, resumed.cursor.set_aside) == (6, (8,))
    assert resumed.success_rates == {"p": 0.5}


def test_after_the_best_was_put_aside_the_next_best_is_that_of_the_sampled_scores(tmp_path):
    for update in (1, 2, 3, 4):
        write_checkpoint_files(tmp_path, update, records=5)
    (tmp_path / "checkpoint-4" / "state.json").write_text("damaged")
    mark_best(tmp_path, 4, 0.9)
    scores = [(0, 0.9, 0.9), (1, 0.9, 0.3), (2, 0.1, 0.6), (3, 0.8, 0.6), (4, 0.9, 0.9)]
    write_records(
        tmp_path,
        *(evaluated(update, greedy, sampled) for update, greedy, sampled in scores),
    )
    archive_in(tmp_path).announce(RecordList())
    assert best(tmp_path) == (2, 0.6)


def test_a_best_checkpoint_that_is_there_stays_the_best_on_a_resume(tmp_path):
    write_checkpoint_files(tmp_path, 1, records=1)
    mark_best(tmp_path, 1, 0.25)
    write_records(tmp_path, evaluated(1, 0.5))
    archive_in(tmp_path).announce(RecordList())
    assert best(tmp_path) == (1, 0.25)


def test_the_last_record_before_a_checkpoint_is_not_reported_again_and_the_first_after_it_is(tmp_path):
    write_checkpoint_files(tmp_path, 2, records=2)
    write_records(tmp_path, {"topic": "start"}, evaluated(1, 0.5), evaluated(2, 0.5))
    archive, records = archive_in(tmp_path), RecordList()
    assert [record["update"] for record in archive.recorded("eval")] == [1]
    archive.take_evaluations(records, [score(1, 0.5), score(2, 0.5)])
    assert records.updates("eval") == [2]


def test_a_checkpoint_is_due_at_multiples_of_either_period(tmp_path):
    due = archive_in(tmp_path, save_steps=4, eval_every_updates=6)
    assert [update for update in range(1, 13) if due.is_due(update)] == [4, 6, 8, 12]
    never = archive_in(tmp_path, save_steps=0, eval_every_updates=0)
    assert not any(never.is_due(update) for update in range(1, 13))


@pytest.mark.parametrize(
    ("total", "scores", "complete"),
    [
        (2, [2], True),
        (1, [2], True),  # max_updates was lowered
        (3, [2], False),  # it was raised
        (2, [], False),  # the last checkpoint still has to be scored
    ],
)
def test_a_run_is_complete_when_all_updates_are_done_and_all_checkpoints_scored(
    tmp_path, total, scores, complete
):
    write_checkpoint_files(tmp_path, 2, records=0)
    write_records(tmp_path, *(evaluated(update, 0.5) for update in scores))
    note = archive_in(tmp_path).note_if_complete(total)
    assert (note is not None) == complete
    assert note is None or f"complete, all {total} updates are done (checkpoint-2)" in note


def test_a_run_without_a_checkpoint_is_never_complete(tmp_path):
    assert archive_in(tmp_path).note_if_complete(0) is None
