"""Fused policies against the trained ones that they are made of, by their logits."""

import json

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
from written import write_checkpoint

from grpo_actors.config import LearnerConfig, ModelConfig
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.export.fidelity import measure
from grpo_actors.export.fusing import load_fused
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoint_weights import write_model

IDS = mx.array([[2, 21, 22, 15, 23, 24, 1, 3]])


def never_called(*_):
    raise AssertionError("nothing trains here")


def trained(run_dir, by=0.05, **settings):
    """A policy away from its start, and the folder of its checkpoint."""
    config = ModelConfig(dtype="float32", lora_rank=4, **settings)
    policy = load_policy(config, seed=0)
    mx.random.seed(1)
    moved = {name: w + by * mx.random.normal(w.shape) for name, w in policy.trainable().items()}
    policy.load_trainable(moved)
    training = Training(policy.model, LearnerConfig(), never_called)
    return policy, write_checkpoint(run_dir, 1, policy, training, {}).path


def loaded(folder, policy):
    """What mlx-lm makes of the written folder."""
    folder.mkdir()
    write_model(folder, policy)
    return mlx_lm.load(str(folder))[0]


def distance(model, other):
    """Mean |Δ logit| over the deviation of the logits."""
    one, two = (m(IDS).astype(mx.float32) for m in (model, other))
    return (mx.abs(one - two).mean() / mx.std(two)).item()


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_mlx_lm_loads_the_fused_model_which_computes_what_the_policy_does(run_dir, tmp_path, kind):
    policy, checkpoint = trained(run_dir, fine_tune_type=kind)
    # float32 all the way, where the embedded base is stored in bfloat16.
    fused = load_fused(checkpoint, policy.config, dequantize=False, dtype="float32")
    base = load_policy(ModelConfig(dtype="float32"), seed=0)
    assert distance(base.model, policy.model) > 0.05
    tolerance = 0.0 if kind == "full" else 1e-5
    assert distance(loaded(tmp_path / "fused", fused), policy.model) <= tolerance


def test_the_base_keeps_its_type(run_dir, tmp_path):
    policy, checkpoint = trained(run_dir, fine_tune_type="lora")
    fused = load_fused(checkpoint, policy.config, dequantize=False, dtype=None)
    model = loaded(tmp_path / "fused", fused)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_quantised_base_stays_so_or_is_unpacked_and_then_the_sum_is_not_rounded(run_dir, tmp_path):
    policy, checkpoint = trained(run_dir, fine_tune_type="lora", base_bits=4)
    packed, plain = (
        loaded(tmp_path / name, load_fused(checkpoint, policy.config, dequantize=unpacks, dtype=None))
        for name, unpacks in (("packed", False), ("plain", True))
    )
    assert packed.model.layers[0].self_attn.q_proj.bits == 4
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert distance(plain, policy.model) < 0.05  # computed in bfloat16
    assert distance(packed, policy.model) > distance(plain, policy.model)


def test_what_rounding_to_few_bits_loses_is_measured_and_unpacked_weights_lose_nothing(run_dir, tmp_path):
    # A young adapter: it moves each weight by some 0.002, the steps of 4 bits are some 0.02.
    policy, checkpoint = trained(run_dir, by=0.005, fine_tune_type="lora", base_bits=4, lora_scale=2.0)

    def found(name, **options):
        loaded(tmp_path / name, load_fused(checkpoint, policy.config, **options))
        return measure(checkpoint, policy.config, tmp_path / name)

    packed = found("packed", dequantize=False, dtype=None)
    exact = found("exact", dequantize=True, dtype="float32")
    assert packed.learned == exact.learned > 0
    assert packed.is_poor
    assert packed.lost > packed.learned
    assert not exact.is_poor
    assert exact.lost < 1e-3 * exact.learned


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_sum_is_rounded_once_to_the_type_asked_for(run_dir, tmp_path, kind):
    policy, checkpoint = trained(run_dir, fine_tune_type=kind)
    fused = load_fused(checkpoint, policy.config, dequantize=False, dtype="float32")
    assert distance(loaded(tmp_path / "fused", fused), policy.model) < 1e-5


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_every_kind_of_packing_is_unpacked_for_the_sum(run_dir, tmp_path, mode):
    base = tmp_path / "base"
    model, tokenizer, config = mlx_lm.load(str(EMBEDDED), return_config=True)
    model, config = mlx_lm.utils.quantize_model(model, config, 32, 4, mode=mode)
    mlx_lm.utils.save(base, str(EMBEDDED), model, tokenizer, config)
    policy, checkpoint = trained(run_dir, model_name=str(base), fine_tune_type="lora")
    fused = load_fused(checkpoint, policy.config, dequantize=True, dtype="float32")
    assert distance(loaded(tmp_path / "fused", fused), policy.model) < 1e-4
    assert "quantization" not in json.loads((tmp_path / "fused" / "config.json").read_text())


def test_quantised_weights_have_no_other_type(run_dir):
    policy, checkpoint = trained(run_dir, fine_tune_type="lora", base_bits=4)
    with pytest.raises(ModelError, match="the weights are quantised; add --dequantize"):
        load_fused(checkpoint, policy.config, dequantize=False, dtype="float16")


def test_an_adapter_is_not_fused_into_what_it_was_not_trained_on(run_dir):
    _, checkpoint = trained(run_dir, fine_tune_type="lora")
    other = ModelConfig(fine_tune_type="lora", lora_scale=1.0)
    with pytest.raises(ConfigError, match=r"set model\.lora_scale = 20\.0"):
        load_fused(checkpoint, other, dequantize=False, dtype=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_transformers_says_the_same_greedy_tokens(run_dir, tmp_path, kind):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    policy, checkpoint = trained(run_dir, fine_tune_type=kind)
    fused = load_fused(checkpoint, policy.config, dequantize=False, dtype="float32")
    ours = loaded(tmp_path / "fused", fused)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    prompt = IDS[0].tolist()
    said = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert said[0, len(prompt) :].tolist() == greedy(ours, prompt, 32)


def greedy(model, prompt, tokens):
    said = list(prompt)
    for _ in range(tokens):
        said.append(mx.argmax(model(mx.array([said]))[0, -1]).item())
    return said[len(prompt) :]
