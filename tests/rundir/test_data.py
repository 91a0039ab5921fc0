"""What a run trains on, and the prompt around its problems."""

import pytest
from checkpoint_files import write_checkpoint_files

from grpo_actors.config import Config, DataConfig
from grpo_actors.errors import RunError
from grpo_actors.rundir import data as module
from grpo_actors.rundir.checkpoints import write_json
from grpo_actors.rundir.data import check_data, claim_data, common_system_prompt, read_data
from grpo_actors.rundir.prompting import SHOWN_CHARACTERS, Prompting, notice, prompting_of, prompting_of_run
from grpo_actors.tasks.registry import load_task
from grpo_actors.tasks.task import Problem


def problem(system):
    asked = {"role": "user", "content": "?"}
    return Problem("p", ({"role": "system", "content": system}, asked) if system else (asked,), "1", {})


@pytest.mark.parametrize(
    ("systems", "common"),
    [([], ""), (["a"], "a"), (["a", "a"], "a"), (["a", "b"], ""), (["a", ""], ""), (["", ""], "")],
)
def test_a_system_prompt_is_that_of_all_problems(systems, common):
    assert common_system_prompt([problem(system) for system in systems]) == common


def test_only_the_first_problems_are_compared(monkeypatch):
    monkeypatch.setattr(module, "COMPARED_PROBLEMS", 2)
    assert common_system_prompt([problem("a"), problem("a"), problem("b")]) == "a"
    assert common_system_prompt([problem("a"), problem("b")]) == ""


@pytest.mark.parametrize("changes", [{"problems": 7}, {"digest": "0"}])
def test_a_run_that_has_trained_continues_with_its_data_only(tmp_path, changes):
    task = load_task(DataConfig(task="arithmetic"), seed=0)
    assert read_data(tmp_path) is None
    claim_data(tmp_path, task)
    noted = read_data(tmp_path)
    assert (noted.problems, noted.digest) == (len(task.problems("train")), task.digest())
    write_checkpoint_files(tmp_path, 1)
    assert check_data(tmp_path, task) == noted
    write_json(tmp_path / "data.json", noted.model_dump() | changes)
    with pytest.raises(RunError, match="has trained on other data"):
        check_data(tmp_path, task)


def test_a_run_without_a_checkpoint_may_begin_with_other_data(tmp_path):
    task = load_task(DataConfig(task="arithmetic"), seed=0)
    write_json(tmp_path / "data.json", {"problems": 7, "digest": "0"})
    assert check_data(tmp_path, task).digest == task.digest()


def test_a_long_system_prompt_is_shown_in_part():
    fits = "x" * (SHOWN_CHARACTERS - 2)  # and its quotes
    assert notice(fits) == f'note: with the system prompt "{fits}"; --no-system leaves it out'
    assert notice(f"{fits}x") == f'note: with the system prompt "{fits}x …; --no-system leaves it out'


def test_the_prompt_of_a_run_is_that_of_its_data_else_of_its_settings(tmp_path):
    settings = Config(data=DataConfig(system_prompt="typed", chat_template_kwargs={"think": True}))
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    assert prompting_of_run(tmp_path) == Prompting("typed", {"think": True})
    write_json(tmp_path / "data.json", {"problems": 7, "digest": "0"})
    assert prompting_of_run(tmp_path) == Prompting("", {"think": True})
    checkpoint = tmp_path / "checkpoint-1"
    assert prompting_of(str(checkpoint)) == Prompting()
    write_checkpoint_files(tmp_path, 1)
    assert prompting_of(str(checkpoint)) == Prompting("", {"think": True})
    (tmp_path / "config.json").unlink()
    assert prompting_of(str(checkpoint)) == Prompting()
