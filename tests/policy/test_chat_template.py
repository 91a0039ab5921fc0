"""Chat templates: which one is used, and what ends a turn."""

import json
import shutil

import pytest

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy import chat_template
from grpo_actors.policy.chat_template import choose
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_base

CHAT = [{"role": "user", "content": "12"}]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def load(folder, template=None, **fields):
    """A copy of the embedded model with other fields in its tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    given = {} if template is None else {"chat_template": template}
    path.write_text(json.dumps(json.loads(path.read_text()) | given | fields))
    return load_base(ModelConfig(model_name=str(folder), dtype="float32"))


NAMED = [{"name": "plain", "template": "{{ messages[0].content }}"}, {"name": "rag", "template": "<|end|>"}]


def test_a_template_is_used_by_its_name(folder):
    policy = load(folder, NAMED)
    policy.chat.use("plain")
    assert policy.decode(policy.chat.encode(CHAT)) == "12"
    assert policy.chat.text == "{{ messages[0].content }}"


def test_a_template_is_used_by_its_text_also_without_one_of_the_models_own(folder):
    policy = load(folder, template="")
    policy.chat.use("<|user|>{{ messages[0].content }}")
    assert policy.decode(policy.chat.encode(CHAT)) == "<|user|>12"


def test_a_conversation_that_ends_with_the_assistant_is_continued_within_its_turn(tiny):
    said = [*CHAT, {"role": "assistant", "content": "So"}]
    assert tiny.tokenizer.decode(tiny.chat.encode(said)) == "<|user|>12<|end|><|assistant|>So"
    assert tiny.chat.render(said, asks=False) == "<|user|>12<|end|><|assistant|>So<|end|>"


@pytest.mark.parametrize("wanted", ["", "default"])
def test_the_default_is_the_models_own(tiny, wanted):
    before = tiny.chat.encode(CHAT)
    tiny.chat.use(wanted)
    assert (tiny.chat.encode(CHAT), tiny.chat.text) == (before, "")


def test_several_templates_without_a_default_need_a_choice(folder):
    policy = load(folder, NAMED)
    with pytest.raises(ModelError, match=r"data\.chat_template: must name one of .* no default: plain, rag$"):
        policy.chat.use("")
    with pytest.raises(
        ModelError, match=r"data\.chat_template: must be a Jinja file, .* \(plain, rag\), got 'tool'$"
    ):
        policy.chat.use("tool")


def test_a_name_for_a_model_whose_template_has_none_is_refused(tiny):
    with pytest.raises(ModelError, match="must be a Jinja file, m has no templates with names, got 'rag'"):
        choose(tiny.tokenizer, "rag", "m")


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_cure(tiny):
    tiny.tokenizer.chat_template = None
    tiny.tokenizer.has_chat_template = False
    with pytest.raises(ModelError, match="chat_template"):
        tiny.chat.encode([{"role": "user", "content": "1"}])


LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}{% set x = i * j %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_ended(tiny, monkeypatch):
    monkeypatch.setattr(chat_template, "TEMPLATE_S", 0.1)
    tiny.tokenizer.chat_template = LOOPS
    with (
        pytest.raises(ModelError, match=r"its chat template does not end within 0\.1 s"),
        tiny.chat.limited(),
    ):
        tiny.chat.encode([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ range(10**9) }}",
        "{{ messages[7].content }}",
        "{{ 'a' + 1 }}",
        "{{ ''.join(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_whatever_a_template_raises_is_one_line(tiny, template):
    tiny.tokenizer.chat_template = template
    with pytest.raises(ModelError, match="its chat template refuses the turns user") as caught:
        tiny.chat.encode([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


def test_a_template_without_system_turns_raises_an_error_that_names_the_setting(tiny):
    tiny.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ModelError, match=r"System role not supported.*system_prompt"):
        tiny.chat.encode([{"role": "system", "content": "s"}, {"role": "user", "content": "1"}])


# --- the end of a turn ----------------------------------------------------------------------------

#: The tokens <|end|> and <|pad|> of the embedded model.
END, PAD = 1, 0
EVERY_TURN = "{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}"
#: As in gpt-oss: the last turn ends in another way than the ones before it.
LAST_TURN = "{% for m in messages %}{{ m.content }}{{ '<|pad|>' if loop.last else '<|end|>' }}{% endfor %}"
#: As in GLM: a turn ends where the next one begins.
NEXT_TURN = "{% for m in messages %}{{ '<|end|>' if m.role == 'user' }}{{ m.content }}{% endfor %}"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "model_ends_at", "also_at", "ends_turns"),
    [
        (EVERY_TURN, "<|end|>", None, True),
        (EVERY_TURN, "<|pad|>", END, True),
        (LAST_TURN, "<|pad|>", None, True),
        (LAST_TURN, "<|end|>", PAD, True),
        (NEXT_TURN, "<|end|>", None, True),
        (NEXT_TURN, "<|pad|>", END, True),
        (NO_END, "<|end|>", None, False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "<|end|>", None, False),
        # These do not show an answer.
        ("{{ messages[0].content }}", "<|end|>", None, True),
        ("{{ raise_exception('no') }}", "<|end|>", None, True),
    ],
)
def test_the_end_of_a_turn_in_the_template_ends_a_completion(
    folder, template, model_ends_at, also_at, ends_turns
):
    ids = {"<|end|>": END, "<|pad|>": PAD}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | {"eos_token_id": ids[model_ends_at]}))
    policy = load(folder, template, eos_token=model_ends_at, pad_token=None)
    assert policy.tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>"]) == [END, PAD]
    assert policy.chat.turn_end == also_at
    assert policy.stop_tokens == {ids[model_ends_at]} | ({also_at} if also_at is not None else set())
    assert policy.chat.ends_turns == ends_turns
