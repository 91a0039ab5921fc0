"""What the learner leaves out before it counts the updates of a run."""

import json

import pytest

from grpo_actors.config import load_config
from grpo_actors.config.wording import toml_value
from grpo_actors.errors import DataError, ModelError
from grpo_actors.learner.prompts import PromptLimit
from grpo_actors.tasks.registry import open_task


def task_of(tmp_path, prompts, *more):
    path = tmp_path / "data.jsonl"
    rows = [{"question": prompt, "answer": 1} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "mine", "task": "dataset", "path": str(path), "system_prompt": ""}
    settings = ["functions={ soft_format = 1.0 }", f"sources={toml_value([source])}", *more]
    return open_task(load_config(None, settings).config)


def test_problems_with_long_prompts_are_left_out_and_counted(tmp_path, tiny):
    prompts = [f"How many are {n} and {n}?" + " Or more?" * (10 * (n % 4 == 0)) for n in range(40)]
    task = task_of(tmp_path, prompts)
    before = {p.id: len(tiny.chat.encode(p.messages)) for p in task.problems("train")}
    limit = 40
    fitting = [problem for problem, length in before.items() if length <= limit]
    assert 0 < len(fitting) < len(before)
    line = PromptLimit(tiny, limit).apply(task)
    assert [problem.id for problem in task.problems("train")] == fitting
    assert len(task.train_sources()["mine"]) == len(fitting)
    assert line == (
        f"{len(before) - len(fitting)} of {len(before)} training problems have a prompt of more than 40 tokens "
        f"(data.max_prompt_length; the longest has {max(before.values())}) and are left out"
    )
    assert PromptLimit(tiny, limit).apply(task) is None


# The second one's tokens are its characters: as many as the bytes of which they are guessed.
@pytest.mark.parametrize("prompt", ["How many are 2 and 2?", "~^~^~^~^"])
def test_a_prompt_as_long_as_the_limit_stays(tmp_path, tiny, prompt):
    task = task_of(tmp_path, [f"{start}{n}" for start in ("", prompt) for n in range(4)])
    longest = next(p for p in task.problems("train") if prompt in p.messages[-1]["content"])
    length = len(tiny.chat.encode(longest.messages))
    PromptLimit(tiny, length).apply(task)
    assert longest in task.problems("train")
    PromptLimit(tiny, length - 1).apply(task)
    assert longest not in task.problems("train")


def test_without_a_prompt_that_is_short_enough_no_run_starts(tmp_path, tiny):
    task = task_of(tmp_path, ["How many are 2 and 2?", "How many are 3 and 3?"])
    with pytest.raises(
        DataError, match=r"'mine' has no prompt that is short enough \(data.max_prompt_length"
    ):
        PromptLimit(tiny, 3).apply(task)


def test_without_a_source_of_its_own_name_the_setting_is_named(tmp_path, tiny):
    rows = "".join(f'{{"question": "{n}?", "answer": 1}}\n' for n in range(3))
    (tmp_path / "data.jsonl").write_text(rows)
    settings = ["task=dataset", f"path={tmp_path}/data.jsonl", "functions={ soft_format = 1.0 }"]
    task = open_task(load_config(None, settings).config)
    with pytest.raises(
        DataError, match=r"data.max_prompt_length: no problem has a prompt of at most 3 tokens"
    ):
        PromptLimit(tiny, 3).apply(task)


def test_turns_that_the_template_refuses_are_named_with_their_problem(tmp_path, tiny):
    tiny.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "1+1?"}, {"role": "tool", "content": "2"}]
    task = task_of(tmp_path, ["How many?", "How much?", "How far?", chat], "eval_fraction=0.001")
    with pytest.raises(
        ModelError, match=r"mine/data/4: tiny: its chat template refuses the turns user, tool"
    ):
        PromptLimit(tiny, 100).apply(task)


def test_a_beginning_of_the_answer_is_continued(tiny):
    question = {"role": "user", "content": "How many are 2 and 2?"}
    begun = tiny.chat.encode([question, {"role": "assistant", "content": "<reasoning>"}])
    text = tiny.tokenizer.encode("<reasoning>", add_special_tokens=False)
    assert begun == [*tiny.chat.encode([question]), *text]
