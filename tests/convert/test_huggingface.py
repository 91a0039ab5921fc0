import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from convert_tool import refusal, run
from mlx.utils import tree_flatten

from grpo_actors.config import ModelConfig
from grpo_actors.convert import fidelity, huggingface
from grpo_actors.convert.__main__ import upload
from grpo_actors.errors import ModelError, RunError
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.plan import Plan


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The embedded model, copied to a folder of the user's."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "source", ignore=shutil.ignore_patterns("*.py")))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def printed_difference(printed: str) -> float:
    """Return the figure in the summary's line on log-probs."""
    (line,) = (line for line in printed.splitlines() if line.startswith("check"))
    return float(line.split("|")[2].split()[0])


def weights(folder: Path) -> dict[str, Any]:
    return dict(tree_flatten(mlx_lm.load(str(folder))[0].parameters()))


# --- what is written ---


def test_a_model_is_in_memory_only_while_it_is_written(source, tmp_path):
    before = mx.get_active_memory()
    model, _ = huggingface.load_lazily(source, Plan())
    sizes = [array.nbytes for _, array in tree_flatten(model.parameters())]
    assert mx.get_active_memory() - before < sum(sizes) / 2
    huggingface._save(model, tmp_path)
    assert sum(array.nbytes for _, array in tree_flatten(model.parameters())) == 0


@pytest.mark.parametrize("dtype", [(), ("--dtype", "float32")])
def test_without_quantisation_the_log_probs_are_the_sources_exactly(source, tmp_path, capsys, dtype):
    assert run("--hf-path", source, "--output-dir", tmp_path / "model", *dtype, "--sample-tokens", 2) == 0
    printed = capsys.readouterr().out
    assert printed_difference(printed) == 0.0
    assert "asked   What is the capital of France?" in printed
    written, stored = weights(tmp_path / "model"), weights(source)
    assert written.keys() == stored.keys()
    assert all(mx.array_equal(written[name], stored[name].astype(written[name].dtype)) for name in stored)


@pytest.mark.parametrize(("bits", "at_most"), [(2, 8), (3, 4), (4, 2), (5, 1), (6, 0.5), (8, 0.1)])
def test_quantised_weights_take_the_bits_asked_for_and_move_the_log_probs(tmp_path, capsys, bits, at_most):
    arguments = ("--quantize", "--bits", bits, "--group-size", 32, "--sample-tokens", 0)
    assert run("--hf-path", "tiny", "--output-dir", tmp_path / "model", *arguments) == 0
    printed = capsys.readouterr().out
    # A group of 32 has a scale and an offset of 16 bits each, which is one more bit a weight; norms keep 16 bits.
    assert f"{bits + 1}.0" in printed.splitlines()[0]
    # One more bit halves the quantisation step, and about halves the difference.
    assert 0 < printed_difference(printed) < at_most
    assert json.loads((tmp_path / "model" / "config.json").read_text())["quantization"]["bits"] == bits


def test_quantised_weights_are_those_that_mlx_lms_own_converter_writes(source, tmp_path, capsys):
    assert run("--hf-path", source, "-q", "--output-dir", tmp_path / "ours", "--sample-tokens", 0) == 0
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True)
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_quantised_folder_trains_with_an_adapter(source, tmp_path):
    assert run("--hf-path", source, "-q", "--output-dir", tmp_path / "model", "--sample-tokens", 0) == 0
    policy = load_policy(ModelConfig(model_name=str(tmp_path / "model"), fine_tune_type="lora"), seed=0)
    assert all("lora" in name for name in policy.trainable())


def test_the_given_end_token_is_the_only_one_that_ends_answers(source, tmp_path):
    arguments = ("--eos-token", "<|user|>", "--sample-tokens", 0)
    assert run("--hf-path", source, "--output-dir", tmp_path / "model", *arguments) == 0
    _, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    assert tokenizer.eos_token_ids == {tokenizer.get_vocab()["<|user|>"]}
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|user|>"


def test_the_embedded_models_name_is_a_source_too(tmp_path):
    assert run("--hf-path", "tiny", "--output-dir", tmp_path / "model", "--sample-tokens", 0) == 0


# --- the comparison ---


def test_the_difference_is_the_mean_over_the_texts_log_probs(source, tmp_path):
    """The written folder has a scaled last norm; mlx-lm's logits give the expected difference."""
    written = Path(shutil.copytree(source, tmp_path / "written"))
    stored = mx.load(str(written / "model.safetensors"))
    name = "model.norm.weight"
    mx.save_safetensors(str(written / "model.safetensors"), stored | {name: stored[name] * 1.5})
    plan = Plan(bits=4)  # with quantisation a difference is no error

    def log_probs(folder: Path) -> mx.array:
        model, tokenizer = mlx_lm.load(str(folder))
        model.set_dtype(mx.float32)
        tokens = mx.array(tokenizer.encode(fidelity.TEXT))
        logits = model(tokens[None])[0, :-1]
        table = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(table, tokens[1:, None], axis=-1)

    wanted = mx.abs(log_probs(source) - log_probs(written)).mean().item()
    got = fidelity.logprob_difference(lambda: huggingface.load_lazily(source, plan)[0], written, plan)
    assert wanted > 0.1
    assert got == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ModelError, match="was not read as it is meant"):
        fidelity.logprob_difference(lambda: huggingface.load_lazily(source, plan)[0], written, Plan())


def test_a_source_that_does_not_fit_into_memory_is_not_loaded_for_the_comparison(source, monkeypatch):
    def too_large():
        raise AssertionError

    assert (
        fidelity.logprob_difference(lambda: huggingface.load_lazily(source, Plan())[0], source, Plan()) == 0.0
    )
    monkeypatch.setattr(fidelity, "MEMORY_SHARE", 0)
    assert fidelity.logprob_difference(too_large, source, Plan()) is None


# --- what is refused ---


def refused(capsys, tmp_path: Path, *arguments: object) -> str:
    """Run a conversion that must be refused and leave nothing behind; returns its one line."""
    line = refusal(capsys, *arguments, "--output-dir", tmp_path / "model")
    assert not list(tmp_path.glob("model*"))
    return line


def test_a_folder_that_is_no_model_is_refused(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "config.json not found" in refused(capsys, tmp_path, "--hf-path", tmp_path / "empty")
    (source / "model.safetensors").unlink()
    assert "model*.safetensors not found" in refused(capsys, tmp_path, "--hf-path", source)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no folder nowhere"),
        ("a/b/c", "is no hub id"),
        ("owner/name", "the hub did not give it"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(tmp_path, capsys, monkeypatch, name, words):
    # Nothing listens at this address, as on a machine without a network.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert words in refused(capsys, tmp_path, "--hf-path", name)


def test_an_unknown_architecture_is_refused_with_the_known_ones_the_nearest_first(source, tmp_path, capsys):
    edit_config(source, model_type="qwen33")
    line = refused(capsys, tmp_path, "--hf-path", source)
    assert "mlx-lm does not know model_type 'qwen33'; it knows qwen3, " in line
    known = line.rpartition("it knows ")[2].strip().split(", ")
    assert {"llama", "mistral", "gemma3_text"} <= set(known)
    assert not {"base", "cache", "rope_utils"} & set(known)


def test_every_type_named_as_known_is_one_that_mlx_lm_loads():
    known = huggingface.known_types("olmo")  # olmo's module needs a package that is absent here
    assert len(known) > 100
    assert [name for name in known if not huggingface.is_known({"model_type": name})] == []


def test_a_group_size_that_does_not_divide_a_row_is_refused_with_one_that_does(source, tmp_path, capsys):
    line = refused(capsys, tmp_path, "--hf-path", narrow(source), "-q", "--group-size", 64)
    assert "--group-size 64 does not divide the rows of" in line
    assert "which have 96 weights; take --group-size 32" in line


def narrow(source: Path) -> Path:
    """Give the model random weights and 96 features, which 32 divides and 64 does not."""
    edit_config(source, hidden_size=96, head_dim=32, num_attention_heads=4, num_key_value_heads=4)
    (source / "model.safetensors").unlink()
    model_class, arguments = mlx_lm.utils._get_classes(config := mlx_lm.utils.load_config(source))
    model = model_class(arguments.from_dict(config))
    model.save_weights(str(source / "model.safetensors"))
    return source


def test_weights_that_are_quantised_are_not_quantised_again(source, tmp_path, capsys):
    assert run("--hf-path", source, "-q", "--output-dir", tmp_path / "first", "--sample-tokens", 0) == 0
    capsys.readouterr()
    assert "are quantised already" in refused(capsys, tmp_path, "--hf-path", tmp_path / "first", "-q")


def test_code_next_to_the_weights_does_not_run_without_consent(source, tmp_path, capsys):
    edit_config(source, model_file="own.py")
    (source / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    line = refused(capsys, tmp_path, "--hf-path", source)
    assert "runs Python code of its own (own.py); read it, then add --trust-remote-code" in line
    trusted = ("--trust-remote-code", "--sample-tokens", 2)
    assert run("--hf-path", source, "--output-dir", tmp_path / "model", *trusted) == 0
    assert (tmp_path / "model" / "own.py").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", 4), "--bits needs --quantize beside it"),
        (("--group-size", 32), "--group-size needs --quantize beside it"),
        (("--eos-token", "<|nobody|>"), "its special tokens are <|"),
        (("--upload-repo", "name"), "must be owner/name"),
        (("--upload-repo", "owner/name"), "there is no token"),
    ],
)
def test_an_unusable_option_is_refused(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert words in refused(capsys, tmp_path, "--hf-path", "tiny", *options)


def test_an_upload_without_a_network_is_refused_before_the_work(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    line = refused(capsys, tmp_path, "--hf-path", source, "--upload-repo", "owner/name")
    assert "nothing was made" in line


def test_an_upload_that_fails_after_the_work_leaves_the_folder_and_says_how_to_send_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"owner/name was not written .*is whole: send it with hf upload owner/name"
    ):
        upload(tmp_path, "owner/name", "first/origin")
    assert "base_model: first/origin" in (tmp_path / "README.md").read_text()


def test_a_disk_too_small_is_refused_with_both_figures(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))
    # 697,472 weights of two bytes.
    assert "the weights take 1,394,944 bytes, the disk has 1 free" in refused(
        capsys, tmp_path, "--hf-path", source
    )


def test_a_weights_file_that_is_cut_short_is_refused(source, tmp_path, capsys):
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert str(source) in refused(capsys, tmp_path, "--hf-path", source)


def test_a_config_without_a_size_is_refused(source, tmp_path, capsys):
    edit_config(source, hidden_size=None)
    assert "mlx-lm does not load it" in refused(capsys, tmp_path, "--hf-path", source)
