"""Bad input ends in one clear line and exit code 2, before any process starts, and leaves nothing behind."""

import importlib.util
import json
import shutil
import socket

import pytest
from commands import launch_here
from runs import Run, new_run, wait_until
from scores import score

from grpo_actors.policy.locate import EMBEDDED


@pytest.fixture
def run():
    with new_run() as run:
        yield run


def refused(run: Run, *arguments: str) -> str:
    """Return the one line of the refusal, without its process."""
    here = {"cwd": run.folder.parent, "environment": run.environment}
    done = launch_here(*run.launch_arguments(*arguments), **here)
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def assert_refused(run: Run, *arguments: str) -> str:
    """Return the one line of the refusal; assert that nothing is left."""
    before = set(run.folder.parent.iterdir())
    line = refused(run, *arguments)
    assert set(run.folder.parent.iterdir()) == before
    assert [path.name for path in run.temporary.iterdir()] == ["mlx"]
    return line


def test_a_missing_configuration_file(run):
    line = assert_refused(run, "--config", "nowhere.toml")
    assert "nowhere.toml" in line
    assert run.run("--config", "nowhere.toml") == 2
    assert run.stderr == f"error: {line}\n"


def test_an_unknown_key_is_answered_with_the_nearest_one(run):
    line = assert_refused(run, "--set", "num_generation=8")
    assert "num_generation is not a setting" in line
    assert "num_generations" in line


def test_a_wrong_type(run):
    assert "rollout.num_generations" in assert_refused(run, "--set", "num_generations=many")


@pytest.mark.parametrize("line", ["temprature = 0.5", "temperature = [1]", "temperature ="])
def test_a_bad_line_of_the_configuration_file(run, line):
    file = run.folder.parent / "my.toml"
    file.write_text(f"[rollout]\n{line}\n")
    assert assert_refused(run, "--config", str(file)).startswith("my.toml: ")


def test_a_group_of_one(run):
    line = assert_refused(run, "--set", "num_generations=1")
    assert "rollout.num_generations must be at least 2 (a group of one has no baseline), got 1" in line


def test_an_unknown_reward_is_answered_with_the_nearest_one(run):
    line = assert_refused(run, "--set", "reward.functions={corectness=1.0}")
    assert "corectness" in line
    assert "'correctness'" in line


def test_a_reward_that_needs_a_column_which_the_data_has_not(run):
    file = run.folder.parent / "my_rewards.py"
    file.write_text("def right(completions, solution, **columns):\n    return [0.0] * len(completions)\n")
    line = assert_refused(run, "--set", f'reward.functions={{"{file}:right"=1.0}}')
    assert line == (
        f"reward.functions: '{file}:right' needs the column 'solution'; the training data has kind, operands; "
        "add it, or give the argument a default"
    )


def test_running_what_the_model_wrote_without_leave(run):
    line = assert_refused(run, "--set", "reward.functions={code_tests=1.0}")
    assert "unless reward.allow_code_execution = true" in line


def test_an_unknown_task_of_reasoning_gym_is_answered_with_the_nearest_one(run):
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("needs reasoning-gym")
    line = assert_refused(run, "--set", "task=reasoning_gym", "--set", "gym_task=chain_sun")
    assert "data.gym_task: reasoning-gym has no task 'chain_sun'; did you mean chain_sum" in line


def test_rewards_that_are_worth_nothing(run):
    assert "reward.functions" in assert_refused(run, "--set", "reward.functions={correctness=0.0}")


def test_a_missing_file_of_an_own_reward(run):
    line = assert_refused(run, "--set", 'reward.functions={"own.py:score"=1.0}')
    assert f"there is no file {run.folder.parent.resolve() / 'own.py'}" in line


def test_an_own_reward_that_is_not_in_its_file(run):
    (run.folder.parent / "own.py").write_text("def scores(completions): ...\n")
    line = assert_refused(run, "--set", 'reward.functions={"own.py:score"=1.0}')
    assert "own.py has no function 'score'; did you mean 'scores'?" in line


def test_a_model_folder_that_is_not_there(run):
    assert "no folder /nowhere/model" in assert_refused(run, "--set", "model_name=/nowhere/model")


def test_a_model_folder_without_weights(run):
    folder = run.folder.parent / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert f"{folder} holds no weights" in assert_refused(run, "--set", f"model_name={folder}")


def test_a_data_set_with_a_bad_line_is_refused_by_file_and_line(run):
    path = run.folder.parent / "data.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?", "ans\n')
    line = assert_refused(run, "--set", "task=jsonl", "--set", f"path={path}")
    assert f"{path}:2: " in line


def test_a_data_set_smaller_than_one_update(run):
    path = run.folder.parent / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": n}) + "\n" for n in range(3)))
    sets = ("task=jsonl", f"path={path}", "max_updates=0", "batch_size=4")
    assert "fewer than the 4 of one update" in assert_refused(run, *(f"--set={text}" for text in sets))


@pytest.mark.parametrize("offset", [0, 2])
def test_a_port_in_use_also_the_last_of_the_three(run, offset):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = assert_refused(run, "--set=scheme=tcp", f"--set=port={port - offset}")
    assert f"transport.port: tcp://127.0.0.1:{port} cannot be bound (Address already in use)" in line


def test_a_resume_without_a_checkpoint(run):
    assert f"{run.folder} holds no checkpoint to continue from" in assert_refused(run, "--resume")


def test_a_resume_with_settings_that_matter_names_them_with_both_values(on_policy_run):
    settings = on_policy_run.settings | {"seed": 7, "num_generations": 6, "learning_rate": 1.0}
    with new_run(**settings) as other:
        line = refused(other)
    assert "run.seed was 0, is 7, rollout.num_generations was 4, is 6;" in line
    assert "learning_rate" not in line


def test_a_resume_that_was_ruled_out(on_policy_run):
    with new_run(**on_policy_run.settings) as other:
        line = refused(other, "--set", "resume=never")
    assert line.startswith(f"run.resume is never, but {on_policy_run.folder} holds checkpoint-12; ")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "[]", ": must be a table of sections, got []"),
        ("config.json", "{", ": not JSON: "),
        (
            "best.json",
            "[]",
            ": Input should be an object; remove it to let the next evaluation mark the best",
        ),
        (
            "best.json",
            json.dumps({"checkpoint": "../other", "update": 1, "score": score(1.0).model_dump()}),
            ": checkpoint must be checkpoint-1, got '../other'; remove it",
        ),
    ],
)
def test_a_run_file_of_another_form_is_found_before_anything_starts(
    on_policy_run, run, tmp_path, *, name, content, says
):
    shutil.copytree(on_policy_run.folder / "checkpoint-12", tmp_path / "run" / "checkpoint-12")
    for file in ("config.json", "metrics.jsonl", "best.json"):
        shutil.copy(on_policy_run.folder / file, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    settings = on_policy_run.settings | {"output_dir": str(tmp_path / "run")}
    line = assert_refused(run, *(f"--set={key}={json.dumps(value)}" for key, value in settings.items()))
    assert line.startswith(f"{tmp_path / 'run' / name}{says}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume"],
        ["--set", "model_name=/nowhere/model"],
        ["--set", "task=jsonl", "--set", "path=/nowhere/data.jsonl"],
        ["--set", "reward.functions={corectness=1.0}"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_a_dry_run_says_the_same(run, arguments):
    line = assert_refused(run, *arguments)
    assert assert_refused(run, *arguments, "--dry-run") == line


def test_a_folder_that_cannot_be_written_is_said_so(run):
    run.folder.parent.joinpath("file").write_text("")
    line = assert_refused(run, "--set", f"output_dir={run.folder.parent}/file/run")
    assert line.startswith("run.output_dir: ")
    assert line.endswith("cannot be written (Not a directory); choose another folder")


def test_a_file_that_holds_no_weights_is_found_before_anything_starts(run):
    folder = run.folder.parent / "model"
    shutil.copytree(EMBEDDED, folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    line = assert_refused(run, "--set", f"model_name={folder}")
    assert line.endswith("model.safetensors is not a safetensors file, or is cut off")


def test_weights_that_only_the_learner_can_find_unreadable_are_one_line_too(run):
    """It is one line in all: the other actors leave silently."""
    folder = run.folder.parent / "model"
    shutil.copytree(EMBEDDED, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert run.run("--set", f"model_name={folder}") == 2
    errors = [
        line for line in run.said_after_start() if not line.startswith("no update for ")
    ]  # on a busy machine
    assert len(errors) == 1, run.stderr
    assert errors[0].startswith(f"error: model.model_name: '{folder}' cannot be loaded: ")
    run.assert_nothing_left()


@pytest.mark.slow
def test_a_chat_template_that_loops_for_hours_is_one_line(run):
    folder = run.folder.parent / "model"
    shutil.copytree(EMBEDDED, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    loop = "{% for i in range(100000) %}"
    settings["chat_template"] = 3 * loop + "x" + 3 * "{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run.run("--set", f"model_name={folder}") == 2
    (line,) = run.said_after_start()
    assert line.startswith(
        f"error: {folder}: its chat template does not end within 5 s; set data.chat_template"
    )
    run.assert_nothing_left()


def test_a_folder_in_use_is_refused_and_its_run_is_not_disturbed(make_run):
    run = make_run(max_updates=1000, eval_every_updates=0)
    run.start()
    wait_until((run.folder / "config.json").exists, "the folder is locked")
    settings = (run.folder / "config.json").read_text()
    with new_run(**run.settings) as second:
        line = refused(second, "--set", "learning_rate=1")
    assert line == f"run.output_dir: {run.folder} is in use by a live run; stop it, or choose another folder"
    assert (run.folder / "config.json").read_text() == settings
    run.signal(2)
    assert run.end() == 0


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_model_whose_training_cannot_fit_into_memory(run, flags, tmp_path):
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    # Only the header is read: 10^13 weights in a file of a hundred bytes.
    tensor = {"dtype": "BF16", "shape": [10**7, 10**6], "data_offsets": [0, 0]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    line = assert_refused(run, *flags, "--set", f"model_name={tmp_path}")
    assert line.startswith("memory: weights and training state must fit into ")
    assert "lora" in line
