"""Fused policies against the trained ones that they are made of, by their logits."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from written import write_checkpoint

from grpo_actors.config import LearnerConfig, ModelConfig
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.export.fusing import load_fused
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoint_weights import write_model

IDS = mx.array([[2, 21, 22, 15, 23, 24, 1, 3]])


def never_called(*_):
    raise AssertionError("nothing trains here")


def trained(run_dir, **settings):
    """A policy away from its start, and the folder of its checkpoint."""
    config = ModelConfig(dtype="float32", lora_rank=4, **settings)
    policy = load_policy(config, seed=0)
    mx.random.seed(1)
    moved = {name: w + 0.05 * mx.random.normal(w.shape) for name, w in policy.trainable().items()}
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
    # The adapter is added in the base's own type, whose significand has 8 bits: 2^-8 of each weight.
    tolerance = 0.0 if kind == "full" else 0.02
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
    assert distance(plain, policy.model) < 0.02
    assert distance(packed, policy.model) > distance(plain, policy.model)


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
