"""Files written by this package, read back by its own reader and by the reference package."""

import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import json
import shutil
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf_files import Tiny, write

from grpo_actors.convert.gguf import rope, write_folder
from grpo_actors.convert.gguf.writer import write_file
from grpo_actors.errors import ModelError
from grpo_actors.policy.locate import EMBEDDED

IDS = mx.array([[1, 40, 70, 259, 12, 200, 2, 99]])


def folder_of(tmp_path: Path, tiny: Tiny) -> Path:
    """Make a model folder from a file of the reference package."""
    write(tmp_path / "source.gguf", tiny)
    return read(tmp_path / "source.gguf")


def read(file: Path) -> Path:
    folder = file.with_suffix("")
    folder.mkdir()
    write_folder(file, folder, "float32")
    return folder


def written(tmp_path: Path, folder: Path, dtype: str = "float32") -> Path:
    file = tmp_path / "written.gguf"
    write_file(folder, file, dtype)
    return file


def refused(tmp_path: Path, folder: Path, **settings) -> str:
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        write_file(folder, tmp_path / "written.gguf", "float32")
    return str(caught.value)


@pytest.mark.parametrize(
    "tiny",
    [Tiny(), Tiny(tied=False, bias=True), Tiny("qwen2"), Tiny("qwen2", tied=False)],
    ids=["llama", "llama with biases and a head", "qwen2", "qwen2 with a head"],
)
def test_a_float32_file_read_back_is_the_same_model_and_tokenizer(tmp_path, tiny):
    folder = folder_of(tmp_path, tiny)
    back = read(written(tmp_path, folder))
    (model, tokenizer), (model_back, tokenizer_back) = (mlx_lm.load(str(path)) for path in (folder, back))
    assert mx.array_equal(model_back(IDS), model(IDS))
    text = "hello 123 <|im_end|>\n\n<tool>"
    assert tokenizer_back.encode(text) == tokenizer.encode(text)
    assert tokenizer_back.chat_template == tokenizer.chat_template
    assert tokenizer_back.eos_token_ids == tokenizer.eos_token_ids


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_rounds_matrices_and_leaves_vectors(tmp_path, dtype, bits):
    folder = folder_of(tmp_path, Tiny())
    back = read(written(tmp_path, folder, dtype))
    before, after = (mx.load(str(path / "model.safetensors")) for path in (folder, back))
    matrix, vector = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight"
    assert mx.array_equal(after[vector], before[vector])
    # Rounding to a significand of b bits errs by at most 2^-b of the value (normal range).
    difference = mx.abs(after[matrix] - before[matrix])
    assert difference.max() > 0
    assert mx.all(difference <= 2.0**-bits * mx.abs(before[matrix]) + 1e-7).item()


def test_the_reference_package_reads_it(tmp_path):
    """The tensors equal those of the file that the folder came from, in the same order of rows."""
    folder = folder_of(tmp_path, Tiny())
    ours = gguf.GGUFReader(written(tmp_path, folder))
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "source.gguf").tensors}
    assert {tensor.name for tensor in ours.tensors} == theirs.keys()
    for tensor in ours.tensors:
        assert np.array_equal(tensor.data, theirs[tensor.name]), tensor.name


def test_llama_3s_positions_pass_through(tmp_path):
    folder = folder_of(tmp_path, Tiny())
    scaling = {"rope_type": "llama3", "factor": 8.0, **rope.LLAMA3}
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    back = read(written(tmp_path, folder))
    assert json.loads((back / "config.json").read_text())["rope_scaling"] == scaling


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "mamba"}, "the architecture must be one of llama, qwen2"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "the weights are quantised; add --dequantize"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu cannot be written"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"head_dim": 16}, "must have shape"),
    ],
)
def test_settings_that_a_file_cannot_express_are_refused(tmp_path, settings, words):
    assert words in refused(tmp_path, folder_of(tmp_path, Tiny()), **settings)


def test_a_tokenizer_whose_rule_has_no_name_is_refused(tmp_path):
    """The embedded model's rule: single digits, and words never split."""
    folder = tmp_path / "tiny"
    shutil.copytree(EMBEDDED, folder)
    assert "must be a byte-level BPE that splits text like one of gpt-2" in refused(tmp_path, folder)


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path):
    folder = folder_of(tmp_path, Tiny())
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {name: weights[name] * 1e7})
    with pytest.raises(ModelError, match=f"{name} is too large for float16"):
        write_file(folder, tmp_path / "written.gguf", "float16")
