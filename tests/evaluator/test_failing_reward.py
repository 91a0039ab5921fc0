from evaluated import config

from grpo_actors.evaluator.score import answer_problems, held_out
from grpo_actors.tasks.registry import load_task
from grpo_actors.tasks.scoring import Scorer


def test_a_reward_that_fails_has_no_value_and_is_logged_once(tiny, tmp_path, caplog):
    file = tmp_path / "my_rewards.py"
    file.write_text('def labelled(completions):\n    raise KeyError("label")\n')
    name = f"{file}:labelled"
    settings = config()
    task = load_task(settings.data, seed=0)
    questions = held_out(task, settings, tiny, 3)
    with Scorer({name: 1.0}, timeout_s=60) as scorer:
        answered = answer_problems(tiny, task, questions, settings, scorer, temperature=0.0)
    assert [problem.answers[0].rewards for problem in answered] == [{name: None}] * 3
    [record] = caplog.records
    first, *traceback = record.getMessage().splitlines()
    assert first.startswith(f"no value: reward {name}, problem ")
    assert first.endswith(f": raised KeyError: 'label' ({file}:2)")
    assert traceback[-1] == "KeyError: 'label'"
