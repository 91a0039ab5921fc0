"""What a user may do with the result of a run, the likeliest first."""

import pytest
from checkpoint_files import write_checkpoint_files
from scores import score

from grpo_actors.config import Config
from grpo_actors.observe.records import make_record
from grpo_actors.observe.view import RunView
from grpo_actors.rundir.checkpoints import mark_best
from grpo_actors.supervisor.next_commands import next_commands


def view_of(update, total_updates):
    fields = {"update": update, "total_updates": total_updates}
    return RunView().apply(make_record(1, 0.0, "metrics", fields))


@pytest.mark.parametrize(
    ("view", "continues"),
    [(RunView(), False), (view_of(3, 9), True), (view_of(9, 9), False), (view_of(3, None), False)],
)
def test_a_run_that_was_stopped_may_be_continued(tmp_path, view, continues):
    assert list(next_commands(tmp_path, Config(), view)) == ["continue it"] * continues
    write_checkpoint_files(tmp_path, 3)
    shown = ["continue it", "chat with it", "score it", "take it along"]
    assert list(next_commands(tmp_path, Config(), view)) == (shown[:3] if continues else shown[1:])


@pytest.mark.parametrize(("marked", "compares"), [(None, False), (0, False), (3, True)])
def test_a_checkpoint_that_beat_the_base_model_is_scored_beside_it(tmp_path, marked, compares):
    write_checkpoint_files(tmp_path, 3)
    if marked is not None:
        mark_best(tmp_path, marked, score(0.5))
    command = next_commands(tmp_path, Config(), RunView())["score it"]
    assert command.endswith(f"{tmp_path}{' --compare base best' * compares}")


def test_commands_allow_the_code_that_they_run(tmp_path):
    write_checkpoint_files(tmp_path, 3)
    own = Config.model_validate({"reward": {"functions": {"rewards.py:brevity": 1.0}}})
    commands = next_commands(tmp_path, own, RunView())
    assert commands["score it"].endswith(" --allow rewards.py:brevity")
    assert "--allow" not in commands["take it along"]
    # Only the program that started the run has them.
    of_caller = Config.model_validate({"reward": {"functions": {"caller:brevity": 1.0}}})
    assert list(next_commands(tmp_path, of_caller, RunView())) == ["chat with it", "take it along"]
