"""Tokenizer files as they are taken over from a model's folder."""

import json
import shutil

import pytest

from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.tokenizer_files import read_files


@pytest.fixture
def folder(tmp_path):
    """Files of the kinds that stand next to a model."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        shutil.copy(EMBEDDED / name, tmp_path)
    for name in (
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
    ):
        (tmp_path / name).write_text(name)
    for name in ("tokenizer_code.py", "README.md", "optimizer.safetensors", "vocabulary.md"):
        (tmp_path / name).write_text("not the tokenizer's")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    return tmp_path


def test_the_tokenizers_files_are_taken_over_bit_for_bit_and_nothing_else_is(folder):
    files = read_files(folder)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert sorted(files) == [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_a_configuration_of_transformers_5_becomes_one_that_version_4_reads(folder):
    # Version 4 has no such class, and asks extra_special_tokens for its keys.
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "é"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert json.loads(read_files(folder)["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "é",
    }


def test_named_extra_tokens_which_both_versions_know_stay(folder):
    text = '{"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}'
    (folder / "tokenizer_config.json").write_text(text)
    assert read_files(folder)["tokenizer_config.json"] == text.encode()


@pytest.mark.parametrize("own", ["", "a file", "in the configuration"])
def test_the_template_of_an_older_processor_stands_in_where_the_tokenizer_has_none(folder, own):
    (folder / "chat_template.json").write_text('{"chat_template": "older"}')
    config = {"chat_template": "own"} if own == "in the configuration" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if own != "a file":
        (folder / "chat_template.jinja").unlink()
    given = {"": b"older", "a file": b"chat_template.jinja"}.get(own)
    assert read_files(folder).get("chat_template.jinja") == given
