import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from convert_tool import refusal, run

from grpo_actors.config import ModelConfig
from grpo_actors.policy.model import load_policy

IDS = mx.array([[1, 40, 70, 12, 200, 2, 99]])


def need_mlx_vlm() -> None:
    pytest.importorskip("mlx_vlm", reason="needs the extra vision")


@pytest.fixture
def source(tmp_path) -> Path:
    need_mlx_vlm()
    import vision_folders

    vision_folders.write(tmp_path / "source")
    return tmp_path / "source"


def test_a_vision_model_keeps_its_vision_part_and_the_sources_language_part(source, tmp_path, capsys):
    assert run("--hf-path", source, "--output-dir", tmp_path / "model", "--sample-tokens", 2) == 0
    printed = capsys.readouterr().out
    assert "qwen2_vl, with its eyes" in printed
    assert "mean |Δ log-prob| 0 nats" in printed
    written, stored = (mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "model", source))
    # mlx-vlm renames Hugging Face's `visual.` to `vision_tower.` and stores the patch convolution in MLX's order.
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.bias", "merger.mlp.0.weight"):
        assert mx.array_equal(written[f"vision_tower.{name}"], stored[f"visual.{name}"])
    patch = "patch_embed.proj.weight"
    moved = stored[f"visual.{patch}"].transpose(0, 2, 3, 4, 1)
    assert mx.array_equal(written[f"vision_tower.{patch}"], moved)


def test_the_language_part_of_a_vision_model_trains_with_text_alone(source, tmp_path):
    assert run("--hf-path", source, "--output-dir", tmp_path / "model", "--sample-tokens", 0) == 0
    policy = load_policy(ModelConfig(model_name=str(tmp_path / "model"), fine_tune_type="full"), seed=0)
    assert not [name for name in policy.trainable() if "vision" in name]
    assert mx.array_equal(policy.model(IDS), mlx_lm.load(str(source))[0](IDS))


def test_quantisation_leaves_the_vision_part_unquantised_and_the_model_loads(source, tmp_path, capsys):
    arguments = ("-q", "--group-size", 32, "--sample-tokens", 2)
    assert run("--hf-path", source, "--output-dir", tmp_path / "model", *arguments) == 0
    written = mx.load(str(tmp_path / "model" / "model.safetensors"))
    assert [name for name in written if "vision_tower" in name and name.endswith(".scales")] == []
    assert "language_model.model.layers.0.mlp.up_proj.scales" in written
    policy = load_policy(ModelConfig(model_name=str(tmp_path / "model"), fine_tune_type="lora"), seed=0)
    assert policy.model(IDS).shape == (1, 7, 512)


def test_a_group_size_that_does_not_divide_every_row_is_refused(source, tmp_path, capsys):
    line = refusal(capsys, "--hf-path", source, "-q", "--group-size", 128, "--output-dir", tmp_path / "model")
    assert "which have 64 weights; take --group-size 64" in line


def test_text_only_keeps_the_language_part_alone(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx_vlm.convert", None)  # as if it were not installed
    arguments = ("--hf-path", source, "--output-dir", tmp_path / "model", "--sample-tokens", 2)
    line = refusal(capsys, *arguments)
    assert "pip install 'grpo-actors[vision]', or keep its language part alone with --text-only" in line
    assert run(*arguments, "--text-only") == 0
    written = mx.load(str(tmp_path / "model" / "model.safetensors"))
    assert not [name for name in written if "vis" in name]
    assert mx.array_equal(mlx_lm.load(str(tmp_path / "model"))[0](IDS), mlx_lm.load(str(source))[0](IDS))


def test_code_next_to_the_weights_does_not_run_without_consent(source, tmp_path, capsys):
    # mlx-vlm alone would run it.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_file": "own.py"}))
    (source / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    line = refusal(capsys, "--hf-path", source, "--output-dir", tmp_path / "model")
    assert "add --trust-remote-code" in line
    assert not (tmp_path / "ran").exists()


def test_a_vision_model_that_mlx_vlm_does_not_support_is_refused_with_the_supported_types(
    source, tmp_path, capsys
):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vll"}))
    line = refusal(capsys, "--hf-path", source, "--output-dir", tmp_path / "model")
    assert "mlx-vlm does not know model_type 'qwen2_vll'; it knows qwen2_vl, " in line


def test_the_summary_says_if_mlx_lm_does_not_support_the_language_part(source, tmp_path, capsys, monkeypatch):
    from mlx_lm import utils

    # A version of mlx-lm without this model: its list of other names leads to a module that does not exist.
    monkeypatch.delitem(sys.modules, "mlx_lm.models.qwen2_vl", raising=False)
    monkeypatch.setitem(utils.MODEL_REMAPPING, "qwen2_vl", "no_such_module")
    assert run("--hf-path", source, "--output-dir", tmp_path / "model") == 0
    printed = capsys.readouterr().out
    assert "check   none: mlx-lm has no language part for model_type 'qwen2_vl'" in printed
    assert "answer  none, and no training with text alone" in printed
