import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_actors.config import load_config
from grpo_actors.config.data import TASKS, DataConfig
from grpo_actors.errors import ConfigError
from grpo_actors.tasks.library_rewards import LIBRARY_REWARDS
from grpo_actors.tasks.registry import load_task
from grpo_actors.tasks.rewards import REWARDS


def settings(task="dataset", **given):
    return DataConfig(task=task, gym_size=20, gym_eval_size=10, **given)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n}+1?", "answer": n + 1}) + "\n" for n in range(100)))
    return str(file)


@pytest.fixture(params=TASKS)
def data(request, tmp_path, path):
    """The settings of each task, small and offline."""
    if request.param == "reasoning_gym" and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("needs reasoning-gym")
    row = json.dumps({"question": "1+1?", "answer": "1+1 = 2\n#### 2"}) + "\n"
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(row * 5)
    needed = {
        "gsm8k": {"path": str(tmp_path)},
        "dataset": {"path": path},
        "reasoning_gym": {"gym_task": "chain_sum"},
    }
    return settings(request.param, **needed.get(request.param, {}))


def test_every_task_keeps_the_contract(data):
    task, again = load_task(data, seed=3), load_task(data, seed=3)
    assert set(task.default_rewards) <= {*REWARDS, *LIBRARY_REWARDS}
    for split in ("train", "eval"):
        problems = task.problems(split)
        assert len(problems) > 0
        assert len({problem.id for problem in problems}) == len(problems)
        assert problems[0] == again.problems(split)[0]
        assert problems[0].messages[-1]["role"] == "user"
        right = f"<answer>{problems[0].answer}</answer>"
        assert task.is_correct(right, problems[0])
        assert not task.is_correct("<answer>another</answer>", problems[0])
        assert task.answer_of(right, problems[0])
        json.dumps(dict(problems[0].columns), allow_nan=False)  # own rewards get them as JSON
    ids = [problem.id for split in ("train", "eval") for problem in task.problems(split)]
    assert len(ids) == len(set(ids))


def test_max_train_samples_keeps_the_first_and_spares_the_evaluation(data):
    whole = load_task(data, seed=3)
    some = load_task(data.model_copy(update={"max_train_samples": 3}), seed=3)
    assert list(some.problems("train")) == list(whole.problems("train")[:3])
    assert some.problems("eval")[-1] == whole.problems("eval")[-1]
    assert len(some.problems("eval")) == len(whole.problems("eval"))
    assert some.problems("train")[-1] == some.problems("train")[2]
    assert some.problems("train")[:2] == list(some.problems("train"))[:2]
    with pytest.raises(IndexError):
        some.problems("train")[3]


def test_max_train_samples_beyond_the_data_means_all(path):
    assert len(load_task(settings(path=path, max_train_samples=10_000), seed=0).problems("train")) == len(
        load_task(settings(path=path), seed=0).problems("train")
    )


def test_a_system_prompt_replaces_the_tasks_own_in_both_splits(data):
    task = load_task(data.model_copy(update={"system_prompt": "Be brief."}), seed=3)
    for split in ("train", "eval"):
        messages = task.problems(split)[0].messages
        assert [m["content"] for m in messages if m["role"] == "system"] == ["Be brief."]
        assert messages[0]["role"] == "system"
    right = f"<answer>{task.problems('eval')[0].answer}</answer>"
    assert task.is_correct(right, task.problems("eval")[0])
    assert task.answer_of(right, task.problems("eval")[0])


def test_an_empty_system_prompt_means_none(data):
    task = load_task(data.model_copy(update={"system_prompt": ""}), seed=3)
    assert [message["role"] for message in task.problems("train")[0].messages] == ["user"]


def test_an_unknown_task_gets_the_nearest_name():
    with pytest.raises(ConfigError, match=r'data.task must be one of .*, got "gsm9k"; did you mean "gsm8k"'):
        load_config(None, ["task=gsm9k"])


def test_what_a_task_reads_is_a_setting(data):
    sizes = {"train_size", "eval_size"} if data.task == "arithmetic" else set()  # fixed, but for tests
    parameters = inspect.signature(type(load_task(data, seed=3))).parameters
    assert parameters.keys() - sizes <= {"seed", "holds_out", *DataConfig.model_fields}


@pytest.mark.parametrize(
    ("task", "reader"), [("arithmetic", []), ("dataset", ["datasets", "numpy"])], ids=["made", "read"]
)
def test_loading_a_task_imports_nothing_heavy_but_the_library_that_reads_data_sets(path, task, reader):
    given = dict(settings(task, path=path if reader else ""))
    script = (
        "import sys\n"
        "from grpo_actors.config.data import DataConfig\n"
        "from grpo_actors.tasks.registry import load_task\n"
        "import grpo_actors.tasks.scoring, grpo_actors.tasks.gsm8k\n"
        f"load_task(DataConfig(**{given!r}), seed=0)\n"
        "print([name for name in ('mlx', 'mlx.core', 'zmq', 'datasets', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{reader}\n"
