"""What a run adds to its settings, and which of them may continue it."""

import fcntl
import os
import time

import pytest
from checkpoint_files import write_checkpoint_files

from grpo_actors.config import load_config, read_config
from grpo_actors.errors import ConfigError, RunError
from grpo_actors.rundir.claim import check_resume, claimed, total_updates, with_rewards
from grpo_actors.rundir.folder import LOCK, LOCK_FILE, LOCK_PAUSE_S, LOCK_TRIES, is_locked, locked
from grpo_actors.tasks.registry import load_task


def resolved(*overrides):
    config = load_config(None, ["task=arithmetic", *overrides]).config
    return with_rewards(config, load_task(config.data, seed=0))


@pytest.mark.parametrize(
    ("functions", "metric"),
    [
        ("{}", "accuracy"),
        ("{ correctness = 1.0, xml_count = 0.5 }", "accuracy"),
        ('{ correctness = 1.0, "mine.py:short" = 0.5 }', "reward"),
        ('{ correctness = 1.0, "mine.py:short" = 0.0 }', "accuracy"),
        # It reads boxed answers, which the accuracy does not.
        ("{ math_verify = 1.0 }", "reward"),
    ],
)
def test_the_weighted_reward_decides_where_a_reward_of_the_users_counts(functions, metric):
    assert resolved(f"functions={functions}").evaluator.metric == metric
    assert resolved(f"functions={functions}", "metric=accuracy").evaluator.metric == "accuracy"


def test_a_reward_that_compares_with_true_answers_is_refused_if_the_data_has_none(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b"}\n')
    data = ("task=dataset", f"path={path}")
    with pytest.raises(
        ConfigError, match=r"reward.functions: correctness compares with true answers, and the data"
    ):
        resolved(*data)
    assert resolved(*data, "functions={ soft_format = 1.0 }").evaluator.metric == "accuracy"


def test_the_metric_may_be_one_reward_function_of_the_run():
    assert resolved("metric=strict_format").evaluator.metric == "strict_format"
    with pytest.raises(
        ConfigError, match=r"evaluator.metric: must be one of accuracy, reward, .*, got speed"
    ):
        resolved("metric=speed")
    with pytest.raises(ConfigError, match=r"evaluator.metric must be one of accuracy, reward, integer"):
        load_config(None, ["functions={ integer = 1.0 }", "metric=correctness"])


def test_epochs_that_have_fewer_problems_than_one_update_are_refused():
    config = resolved("batch_size=8", "num_generations=4", "num_epochs=2")
    groups = config.groups_per_update
    assert total_updates(config, 5 * groups) == 10
    assert total_updates(resolved("batch_size=8", "num_generations=4", "max_updates=7"), 1) == 7
    with pytest.raises(ConfigError, match=r"learner\.num_epochs: 2 × 1 problems are fewer than the"):
        total_updates(config, 1)


@pytest.mark.parametrize(
    ("resume", "without", "with_checkpoint"),
    [("auto", None, None), ("must", "holds no checkpoint", None), ("never", None, "holds checkpoint-4")],
)
def test_whether_a_folder_may_hold_checkpoints_is_the_users_choice(
    tmp_path, resume, without, with_checkpoint
):
    config = resolved(f"resume={resume}")

    def refusal():
        try:
            check_resume(config, tmp_path)
        except RunError as error:
            return str(error)
        return None

    def is_as_expected(expected):
        found = refusal()
        return found is None if expected is None else expected in found

    assert is_as_expected(without)
    write_checkpoint_files(tmp_path, 4)
    assert is_as_expected(with_checkpoint)


def test_a_run_is_not_continued_by_a_replay_nor_a_replay_by_workers(tmp_path):
    write_checkpoint_files(tmp_path, 4, recording="")
    check_resume(resolved(), tmp_path)
    with pytest.raises(RunError, match="holds a live run, got a replay of groups"):
        check_resume(resolved(), tmp_path, recording="groups")
    write_checkpoint_files(tmp_path, 5, recording="groups")
    check_resume(resolved(), tmp_path, recording="groups")
    for other, got in (("", "a live run"), ("others", "a replay of others")):
        with pytest.raises(RunError, match=f"holds a replay of groups, got {got}; choose another folder"):
            check_resume(resolved(), tmp_path, recording=other)
    # Of a damaged one nobody knows: the one before tells, and without any it may be continued.
    (tmp_path / "checkpoint-5" / "state.json").write_text("{")
    check_resume(resolved(), tmp_path)
    (tmp_path / "checkpoint-4" / "state.json").write_text("{")
    check_resume(resolved(), tmp_path, recording="others")


def test_settings_that_matter_may_not_change_and_are_named_with_both_values(tmp_path):
    saved = resolved("seed=1", "learning_rate=0.1", "shuffle=true")
    (tmp_path / "config.json").write_text(saved.model_dump_json())
    other = resolved("seed=2", "learning_rate=0.2", "shuffle=false")
    check_resume(other, tmp_path)  # nothing to continue
    write_checkpoint_files(tmp_path, 4)
    check_resume(saved, tmp_path)
    with pytest.raises(RunError) as refused:
        check_resume(other, tmp_path)
    assert str(refused.value) == (
        f"run.output_dir: {tmp_path} holds a run with other settings: run.seed was 1, is 2, data.shuffle was true, is "
        "false; set them as they were, or choose another run.output_dir"
    )
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(RunError, match=r"best\.json: "):
        check_resume(saved, tmp_path)


#: Of an earlier run without a checkpoint.
RESULTS = ("evaluation-base.json", "best.json", "data.json", "workers.json")


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_claimed_folder_is_locked_and_keeps_results_only_beside_a_checkpoint(tmp_path, has_checkpoint):
    config = resolved(f"output_dir={tmp_path}")
    drafts = [f"{name}.tmp" for name in ("config.json", "endpoints.json", *RESULTS)]
    for name in (*RESULTS, *drafts, "endpoints.json", "metrics.jsonl"):
        (tmp_path / name).write_text("old")
    if has_checkpoint:
        write_checkpoint_files(tmp_path, 4)
    with claimed(config) as (run_dir, lock):
        assert run_dir == tmp_path
        assert os.fstat(lock).st_ino == (tmp_path / LOCK_FILE).stat().st_ino
        assert is_locked(tmp_path)
        kept = {"config.json", LOCK_FILE, "metrics.jsonl"}
        kept |= {"checkpoint-4", *RESULTS} if has_checkpoint else set()
        assert {path.name for path in tmp_path.iterdir()} == kept
        assert read_config(tmp_path / "config.json") == config
    assert not is_locked(tmp_path)


def test_whoever_asks_whether_a_folder_is_locked_keeps_no_run_out(tmp_path, monkeypatch):
    with (tmp_path / LOCK_FILE).open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)  # as `is_locked` holds it for an instant
        pauses = []

        def pause(seconds):
            pauses.append(seconds)
            if len(pauses) == LOCK_TRIES - 1:
                asking.close()

        monkeypatch.setattr(time, "sleep", pause)
        with locked(tmp_path):
            assert pauses == [LOCK_PAUSE_S] * (LOCK_TRIES - 1)
            with pytest.raises(RunError, match="is in use by a live run; stop it"), locked(tmp_path):
                pass


def test_a_process_that_inherits_the_lock_holds_it_already(tmp_path, monkeypatch):
    monkeypatch.setenv(LOCK, "7")
    with locked(tmp_path / "run") as descriptor:
        assert descriptor == 7
    assert not (tmp_path / "run").exists()
    assert not is_locked(tmp_path / "run")


def test_a_folder_is_made_where_none_is(tmp_path):
    with claimed(resolved(f"output_dir={tmp_path}/new/run")) as (run_dir, _):
        assert {path.name for path in run_dir.iterdir()} == {"config.json", LOCK_FILE}
    assert run_dir.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    with (
        pytest.raises(RunError, match=r"/run cannot be written \(Not a directory\); choose another folder$"),
        claimed(resolved(f"output_dir={folder}")),
    ):
        pass
