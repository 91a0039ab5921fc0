"""The line that shows a run's first prompt, and where its system prompt comes from."""

import json

import pytest

from grpo_actors.config.data import DataConfig
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.learner.rendering import first_prompt, rendered, system_origin
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.answers import FORMAT_REQUEST
from grpo_actors.tasks.task import Problem

USER = {"role": "user", "content": "Hów many?"}


def of_system(text):
    return [{"role": "system", "content": text}, USER]


@pytest.mark.parametrize(
    ("settings", "messages", "origin"),
    [
        ({"system_prompt": "Answer."}, of_system("Answer."), "data.system_prompt"),
        ({"task": "arithmetic"}, of_system(FORMAT_REQUEST), "the task arithmetic"),
        ({"task": "dataset", "path": "mine.jsonl"}, of_system("Theirs."), "the data"),
        # A task asks for its format where the data has no system prompt of its own.
        ({"task": "dataset", "path": "mine.jsonl"}, of_system(FORMAT_REQUEST), "the task dataset"),
        ({"task": "arithmetic"}, [USER], "none"),
    ],
)
def test_the_origin_of_a_system_prompt_is_named(tiny, settings, messages, origin):
    assert system_origin(tiny, DataConfig.model_validate(settings), messages) == origin


@pytest.mark.parametrize(
    ("head", "origin"),
    [
        ("You answer in few words.", "the model's chat template"),  # five words
        ("Answer in few words.", "none"),  # as many as a header may have
        # Special tokens are no words.
        ("<|user|><|end|><|user|><|end|><|user|><|end|>", "none"),
    ],
)
def test_a_template_that_writes_sentences_adds_a_system_prompt(tiny, head, origin):
    tiny.tokenizer.chat_template = f"{head}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    assert system_origin(tiny, DataConfig(), [USER]) == origin


def line_of(policy, *texts, longest=10_000):
    problems = [Problem(f"p{n}", ({"role": "user", "content": text},), "") for n, text in enumerate(texts)]
    order = ProblemOrder(len(problems), 0, shuffle=False)
    supply = Supply(problems, order, 0, 2, longest, policy.chat.encode, rules=None)
    return first_prompt(policy, DataConfig(), supply)


def test_the_first_prompt_is_the_first_that_is_posed_as_the_model_reads_it(tiny):
    tokens = tiny.chat.encode([USER])
    text = rendered(tiny, tokens)
    assert text == "<|user|>Hów many?<|end|><|assistant|>"
    line = f"first prompt ({len(tokens)} tokens; system prompt: none): {json.dumps(text, ensure_ascii=False)}"
    # The first problem is too long, and left out.
    assert line_of(tiny, "How many? " * 9, "Hów many?", longest=len(tokens)) == line


def test_of_a_long_prompt_the_beginning_and_the_end_are_shown(tiny):
    ends = len("<|user|><|end|><|assistant|>")
    for length, left_out in ((2000, 0), (2001, 1), (3500, 1500)):
        text = "".join(str(n % 10) for n in range(length - ends))
        shown = json.loads(line_of(tiny, text).partition("): ")[2])
        whole = f"<|user|>{text}<|end|><|assistant|>"
        if left_out:
            assert shown == f"{whole[:1500]} … {left_out:,} characters … {whole[-500:]}"
        else:
            assert shown == whole
