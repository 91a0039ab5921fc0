"""The tokenizer against the folder's own tokenizer.json."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from grpo_actors.errors import ModelError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.tokenizer import _same_rules, load_tokenizer

TEXT = "What is 12345 + 0.50?\n\n\tIt's naïve — 你好 🙂 <|end|> DON'T"


@pytest.fixture
def folder(tmp_path):
    """The embedded model's configuration and tokenizer: every digit alone, otherwise no splitting before the merges."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, tmp_path)
    return tmp_path


def configure(folder, **fields):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load(folder):
    return load_tokenizer(folder, trust_remote_code=False)


def of_the_file(folder, text=TEXT):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_text_is_split_as_the_folders_file_says_whatever_class_transformers_chooses(folder, name):
    configure(folder, tokenizer_class=name)
    by_class = AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)
    assert (by_class == of_the_file(folder)) == (name == "PreTrainedTokenizerFast")
    tokenizer = load(folder)
    assert tokenizer.encode(TEXT, add_special_tokens=False) == of_the_file(folder)
    assert tokenizer.decode(of_the_file(folder)) == TEXT
    chat = [{"role": "user", "content": TEXT}]
    assert tokenizer.apply_chat_template(chat) == of_the_file(folder, f"<|user|>{TEXT}<|end|>")


def test_a_file_that_transformers_reads_as_it_is_needs_no_second_tokenizer(folder):
    described = json.loads((folder / "tokenizer.json").read_text())
    rules = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    assert _same_rules(rules, described)
    described["added_tokens"][0]["lstrip"] = True
    assert not _same_rules(rules, described)


def test_tokens_that_only_the_configuration_adds_keep_their_ids(folder):
    configure(folder, tokenizer_class="Qwen2Tokenizer", pad_token="<|new|>")  # noqa: S106
    by_class = AutoTokenizer.from_pretrained(folder)
    tokenizer = load(folder)
    new = tokenizer.pad_token_id
    assert (new, tokenizer.get_vocab()) == (by_class.pad_token_id, by_class.get_vocab())
    assert tokenizer.encode("1<|new|>", add_special_tokens=False) == [*of_the_file(folder, "1"), new]


def test_a_class_that_cannot_take_the_files_rules_is_refused(folder):
    configure(folder, tokenizer_class="ByT5Tokenizer")  # a token for each byte, in Python
    with pytest.raises(
        ModelError, match=r"transformers' ByT5Tokenizer splits text otherwise; set tokenizer_class"
    ):
        load(folder)


def test_the_template_of_an_older_processor_is_the_tokenizers(folder):
    configure(folder, chat_template=None)
    assert not load(folder).has_chat_template
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}<|end|>"}')
    tokenizer = load(folder)
    assert tokenizer.has_chat_template
    chat = [{"role": "user", "content": "12"}]
    assert tokenizer.apply_chat_template(chat) == of_the_file(folder, "12<|end|>")
