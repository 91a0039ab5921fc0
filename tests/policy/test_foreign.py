"""Models whose weights cannot be read are refused by the name of what is wrong with them."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.foreign import refuse_foreign
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_base

IDS = mx.array([[2, 21, 22, 15, 23, 24, 1, 3]])


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def load(folder):
    return load_base(ModelConfig(model_name=str(folder), dtype="float32"))


def describe(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("described", "by"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "awq (gemv)"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_weights_quantised_by_another_program_are_refused_by_its_name(folder, described, by):
    describe(folder, quantization_config=described)
    assert refusal(folder) == (
        f"model.model_name: '{folder}': its weights were quantised by {by}, which mlx-lm does not read right; "
        "name the unquantised model (model.base_bits = 4 quantises it here)"
    )


@pytest.mark.parametrize(
    "architecture",
    [
        {
            "quantization": {"bits": 4},
            "quantization_config": {"quant_method": "gptq"},
        },  # MLX's own form as well
        {"quantization_config": None},
        {"quantization_config": {"bits": 4}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": {"quant_method": "awq", "version": "GEMM"}},
        {"quantization_config": {"quant_method": "fp8", "version": "other"}},
    ],
)
def test_a_form_that_mlx_lm_reads_is_not_refused(architecture):
    refuse_foreign("model.model_name", architecture)


def rewrite(folder, **changes):
    """Write the weights again with some of them changed; None leaves one out."""
    file = folder / "model.safetensors"
    weights = {**mx.load(str(file)), **changes}
    mx.eval(weights)
    file.unlink()  # MLX may still read the old one
    mx.save_safetensors(str(file), {name: array for name, array in weights.items() if array is not None})


def test_a_missing_and_a_foreign_tensor_are_named(folder):
    rewrite(folder, **{"model.norm.weight": None})
    assert refusal(folder).endswith("cannot be loaded: Missing 1 parameters: model.norm.weight")
    rewrite(folder, **{"model.norm.weight": mx.ones(128), "vision.a": mx.ones(1), "vision.b": mx.ones(1)})
    assert refusal(folder).endswith(
        "cannot be loaded: Received 2 parameters not in model: vision.a, vision.b"
    )


def test_a_long_list_of_tensors_is_cut(folder):
    rewrite(folder, **{f"vision.layers.{n}.weight": mx.ones(1) for n in range(100)})
    text = refusal(folder)
    assert "Received 100 parameters not in model: vision.layers.0.weight" in text
    assert text.endswith("…")
    assert len(text) < 500


def test_pytorchs_own_files_are_refused_with_the_cure(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "PyTorch's .bin files" in refusal(folder)
    assert "save_pretrained" in refusal(folder)


GROUP = 64
#: Position in a packed number of AWQ -> output feature.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(numbers):
    """Pack eight numbers of four bits [n, out] into each of [n, out / 8]."""
    columns = [
        numbers[:, feature::8].astype(np.uint32) << np.uint32(4 * at) for at, feature in enumerate(ORDER)
    ]
    return mx.array(np.bitwise_or.reduce(columns)).view(mx.int32)


def test_awq_weights_mean_what_they_say(folder):
    """As AutoAWQ stores them: weight = (number - zero) * scale, a scale for each group of inputs."""
    plain, stored = {}, {}
    for name, array in mx.load(str(EMBEDDED / "model.safetensors")).items():
        weight = np.array(array.astype(mx.float32))
        if not name.endswith("_proj.weight"):
            plain[name] = stored[name] = mx.array(weight)
            continue
        groups = weight.reshape(len(weight), -1, GROUP)
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
        zero = np.clip(np.round(-low / scale), 0, 15)
        numbers = np.clip(np.round(groups / scale + zero), 0, 15)
        plain[name] = mx.array(((numbers - zero) * scale).reshape(weight.shape))
        module = name.removesuffix(".weight")
        stored[f"{module}.qweight"] = packed(numbers.reshape(weight.shape).T)
        stored[f"{module}.qzeros"] = packed(zero[..., 0].T)
        stored[f"{module}.scales"] = mx.array(scale[..., 0].T).astype(mx.float16)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    describe(
        folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    )
    expected = load(EMBEDDED)
    expected.model.load_weights(list(plain.items()))
    ours, theirs = load(folder).model(IDS), expected.model(IDS)
    # What is not quantised was stored in float32 and is read in float16, as the scales are.
    assert mx.abs(ours - theirs).max() < 0.02 * mx.std(theirs)
