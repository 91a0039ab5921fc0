"""What an archive reads from a run folder's files and marks there, without a model."""

import json

import pytest
from checkpoint_files import write_checkpoint_files
from hand_made import RecordList
from scores import report, score

from grpo_actors.config import Config, read_config
from grpo_actors.errors import RunError
from grpo_actors.learner.archive import Archive
from grpo_actors.rundir import checkpoints
from grpo_actors.rundir.checkpoints import mark_best
from grpo_actors.wire.messages import Evaluation


def write_records(run_dir, *records):
    lines = [json.dumps({"seq": seq, "time": 0.0} | record) + "\n" for seq, record in enumerate(records, 1)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def evaluated(update, value):
    return {"topic": "eval", "update": update, "score": score(value).model_dump()}


def archive_in(run_dir, *, save_steps=2, eval_every_updates=1):
    settings = {"run": {"save_steps": save_steps}, "evaluator": {"eval_every_updates": eval_every_updates}}
    return Archive(run_dir, Config.model_validate(settings), "new")


def best(run_dir):
    """Return (update, value) of best.json; None if there is none."""
    marked = checkpoints.best(run_dir)
    return None if marked is None else (marked.update, marked.score.value)


def evaluation(update, value, **measure):
    name = f"checkpoint-{update}" if update else "base"
    return Evaluation(update=update, checkpoint=name, report=report(value, **measure))


def scored(run_dir, *values):
    """Return whether each score was recorded as the best, and the mark at the end; values by update, from the base."""
    records = RecordList()
    archive = archive_in(run_dir)
    for update, value in enumerate(values):
        if update:
            write_checkpoint_files(run_dir, update)
        archive.take_evaluations(records, [evaluation(update, value)])
    return [fields["best"] for _, fields in records.records], best(run_dir)


def test_the_best_is_the_highest_score_and_the_newest_of_equal_checkpoints(tmp_path):
    assert scored(tmp_path, 0.25, 0.5, 0.25, 0.5, 0.75, 0.5) == (
        [True, True, False, True, True, False],
        (4, 0.75),
    )


def test_an_own_reward_that_rises_makes_a_later_checkpoint_the_best_also_if_all_accuracies_are_0(tmp_path):
    rewards = [1.21, 1.25, 1.62, 1.5]
    assert scored(tmp_path, *rewards) == ([True, True, True, False], (2, 1.62))


def test_the_base_model_is_the_best_until_a_checkpoint_is_better_than_it(tmp_path):
    assert scored(tmp_path, 0.5, 0.5, 0.25) == ([True, False, False], (0, 0.5))
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "base"


def test_the_score_of_the_best_that_comes_again_after_a_resume_is_its_score(tmp_path):
    write_checkpoint_files(tmp_path, 1, records=1)
    mark_best(tmp_path, 1, score(0.5))
    archive, records = archive_in(tmp_path), RecordList()
    archive.take_evaluations(records, [evaluation(0, 0.3), evaluation(1, 0.4)])
    assert [fields["best"] for _, fields in records.records] == [False, True]
    assert best(tmp_path) == (1, 0.4)


def test_after_a_resume_with_other_settings_the_comparison_starts_over_and_keeps_what_is_to_be_scored_again(
    tmp_path,
):
    for update in (1, 2, 3, 4, 5):
        write_checkpoint_files(tmp_path, update, records=6)
    mark_best(tmp_path, 1, score(0.9))
    write_records(tmp_path, *(evaluated(update, value) for update, value in enumerate((0.1, 0.9, 0.2, 0.3))))
    archive, records = archive_in(tmp_path), RecordList()
    assert archive.unevaluated() == {4, 5}
    archive.take_evaluations(records, [evaluation(0, 0.7, max_new_tokens=128)])
    (topic, warning), (_, base) = records.records
    assert topic == "log"
    assert "(max_new_tokens 64 → 128)" in warning["text"]
    assert base["best"]
    assert best(tmp_path) == (0, 0.7)
    assert archive.unevaluated() == {1, 2, 3, 4, 5}, "none of them is removed before it has its new score"
    archive.take_evaluations(records, [evaluation(1, 0.8, max_new_tokens=128)])
    assert best(tmp_path) == (1, 0.8)
    assert records.updates("eval") == [0, 1]
    assert len([topic for topic, _ in records.records if topic == "log"]) == 1
    # The same once more, as after a reconnection, is not recorded again.
    archive.take_evaluations(records, [evaluation(1, 0.8, max_new_tokens=128)])
    assert records.updates("eval") == [0, 1]


def test_that_the_comparison_starts_over_is_said_also_if_only_the_mark_of_the_best_is_left(tmp_path):
    write_checkpoint_files(tmp_path, 1, records=0)  # all scores came after it, so a resume cuts them
    mark_best(tmp_path, 1, score(0.9))
    archive, records = archive_in(tmp_path), RecordList()
    for update, value in ((0, 0.7), (1, 0.8)):
        archive.take_evaluations(records, [evaluation(update, value, max_new_tokens=128)])
    [warning] = [fields["text"] for topic, fields in records.records if topic == "log"]
    assert "(max_new_tokens 64 → 128)" in warning
    assert best(tmp_path) == (1, 0.8)


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


def test_after_the_best_was_put_aside_the_next_best_of_those_that_are_there_is_marked(tmp_path):
    for update in (1, 2, 3, 4):
        write_checkpoint_files(tmp_path, update, records=5)
    (tmp_path / "checkpoint-4" / "state.json").write_text("damaged")
    mark_best(tmp_path, 4, score(0.9))
    scores = [0.2, 0.3, 0.6, 0.6, 0.9]
    write_records(tmp_path, *(evaluated(update, value) for update, value in enumerate(scores)))
    archive_in(tmp_path).announce(RecordList())
    assert best(tmp_path) == (3, 0.6)


def test_a_best_checkpoint_that_is_there_stays_the_best_on_a_resume(tmp_path):
    write_checkpoint_files(tmp_path, 1, records=1)
    mark_best(tmp_path, 1, score(0.25))
    write_records(tmp_path, evaluated(1, 0.5))
    archive_in(tmp_path).announce(RecordList())
    assert best(tmp_path) == (1, 0.25)


def test_the_last_record_before_a_checkpoint_is_not_reported_again_and_the_first_after_it_is(tmp_path):
    write_checkpoint_files(tmp_path, 2, records=2)
    write_records(tmp_path, {"topic": "start"}, evaluated(1, 0.5), evaluated(2, 0.5))
    archive, records = archive_in(tmp_path), RecordList()
    assert [record["update"] for record in archive.recorded("eval")] == [1]
    archive.take_evaluations(records, [evaluation(1, 0.5), evaluation(2, 0.5)])
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


def test_a_complete_run_names_the_settings_that_were_changed_in_vain_and_keeps_its_own(tmp_path):
    before = Config().model_dump(mode="json")
    before["run"]["save_steps"] = 2  # as in `archive_in`
    before["evaluator"]["eval_every_updates"] = 1
    first = {**before, "learner": before["learner"] | {"learning_rate": 0.25}}  # the last start counts
    before["learner"]["learning_rate"], before["run"]["resume"] = 0.5, "must"
    del before["learner"]["warmup_ratio"], before["health"]  # as an earlier release, which did not know them
    write_checkpoint_files(tmp_path, 2, records=2)
    starts = [{"topic": "start", "config": config} for config in (first, before)]
    write_records(tmp_path, *starts, evaluated(2, 0.5))
    archive = archive_in(tmp_path)
    note = archive.note_if_complete(2)
    assert "(checkpoint-2); learner.learning_rate: changed, without effect; raise learner.max_updates" in note
    (tmp_path / "config.json").write_text(Config().model_dump_json())
    archive.put_settings_back()
    kept = read_config(tmp_path / "config.json")
    assert (kept.learner.learning_rate, kept.run.resume) == (0.5, "auto")


def test_without_an_evaluator_no_score_is_awaited(tmp_path):
    write_checkpoint_files(tmp_path, 2)
    assert archive_in(tmp_path).unevaluated() == {2}
    assert archive_in(tmp_path, eval_every_updates=0).unevaluated() == set()


def test_a_run_without_a_checkpoint_is_never_complete(tmp_path):
    assert archive_in(tmp_path).note_if_complete(0) is None
