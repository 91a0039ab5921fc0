"""LoRA and DoRA on an unquantised base, on a quantised folder, and on a base that is quantised when loaded."""

import json

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from architectures import random_policy
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from written import write_checkpoint

from grpo_actors.config import Config, ModelConfig
from grpo_actors.errors import ConfigError
from grpo_actors.evaluator.comparison.candidates import Candidate, load_candidate
from grpo_actors.policy.adapter import add_adapter, fused
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.dora import fixed_norms, has_dora
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import load_base, load_policy
from grpo_actors.policy.quantization import quantize
from grpo_actors.policy.training import Training
from grpo_actors.policy.weights import freeze, pack, unpack
from grpo_actors.rundir.checkpoint_weights import check_adapter

PROMPT = [2, 21, 22, 15, 23, 24, 1, 3]
TOKENS = mx.array([[*PROMPT, 9, 9]])
ADAPTERS = ["lora", "dora"]


def settings(kind="lora", **changes):
    return ModelConfig(**({"dtype": "float32", "fine_tune_type": kind, "lora_rank": 4} | changes))


def shifted(policy):
    """Move the policy's adapter away from its initial value, where it has no effect; returns the policy."""
    keys = mx.random.split(mx.random.key(1), len(policy.trainable()))
    policy.load_trainable(
        {
            name: array + 0.02 * mx.random.normal(array.shape, key=key)
            for (name, array), key in zip(sorted(policy.trainable().items()), keys, strict=True)
        }
    )
    return policy


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


def mlx_lms_quantised(folder, bits):
    """Write the embedded model as ``mlx_lm.convert -q`` does; returns the folder's path."""
    model, tokenizer, config = mlx_lm.utils.load(str(EMBEDDED), return_config=True)
    model, config = mlx_lm.utils.quantize_model(model, config, group_size=64, bits=bits)
    mlx_lm.utils.save(folder, str(EMBEDDED), model, tokenizer, config)
    return str(folder)


def saved(policy, run_dir):
    training = Training(policy.model, Config().learner, lambda *_: None)
    return write_checkpoint(run_dir, 1, policy, training, {}).path


# --- the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_new_adapter_changes_nothing(kind, bits):
    base = load_base(settings(base_bits=bits))
    policy = load_policy(settings(kind, base_bits=bits), seed=0)
    np.testing.assert_allclose(logits(policy.model), logits(base.model), rtol=1e-5, atol=1e-5)
    assert not np.allclose(logits(shifted(policy).model), logits(base.model), atol=0.1)


def test_with_an_adapter_only_its_own_weights_train():
    def leaves(kind):
        return {name.rpartition(".")[2] for name in load_policy(settings(kind), seed=0).trainable()}

    assert leaves("lora") == {"lora_a", "lora_b"}
    assert leaves("dora") == {"lora_a", "lora_b", "m"}


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_dropout_acts_in_training_only(kind, bits):
    plain, dropping = (
        shifted(load_policy(settings(kind, base_bits=bits, lora_dropout=dropout), seed=0))
        for dropout in (0.0, 0.9)
    )
    samples = [
        sample_groups(policy, [PROMPT], [[1]], SamplingParams(8))[0][0] for policy in (plain, dropping)
    ]
    assert samples[0] == samples[1]
    np.testing.assert_array_equal(logits(dropping.model), logits(plain.model))
    dropping.model.train()
    assert not np.allclose(logits(dropping.model), logits(plain.model), atol=0.01)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_fused_adapter_gives_the_logits_of_the_unfused_one(kind, bits):
    policy = shifted(load_policy(settings(kind, base_bits=bits), seed=0))
    before, names = logits(policy.model), policy.trainable().keys()
    with fused(policy.model):
        assert has_dora(policy.model) == (kind == "dora" and bits > 0)
        np.testing.assert_allclose(logits(policy.model), before, atol=1e-4)
        # Adapters are not fused into packed weights.
        assert (policy.trainable().keys() == names) == bool(bits)
    assert policy.trainable().keys() == names
    assert np.array_equal(logits(policy.model), before)
    with pytest.raises(ZeroDivisionError), fused(policy.model):
        _ = 1 / 0
    assert np.array_equal(logits(policy.model), before)


# A GPU multiplies packed matrices in half precision, and here that is as much as the adapter's share of the norms.
@pytest.mark.parametrize(
    ("family", "bits"), [pytest.param("qwen2", 0, marks=pytest.mark.gpu), ("qwen2", 4), ("stablelm", 8)]
)
def test_dora_gives_the_same_logits_with_norms_computed_once_as_with_norms_of_every_call(family, bits):
    # Both families have biases, which DoRA adds after it applies the magnitudes.
    policy = random_policy(family, hidden_size=64, num_attention_heads=8)
    if bits:
        quantize(policy.model, bits)
    policy.model.set_dtype(mx.float32)
    add_adapter(policy.model, ModelConfig(fine_tune_type="dora", lora_rank=4, lora_scale=1.0), 0)
    shifted(policy)
    original = DoRALinear.__call__
    expected = logits(policy.model)
    with fixed_norms(policy.model):
        assert DoRALinear.__call__ is not original
        # Norms that left out the adapter would move the logits by 0.06.
        np.testing.assert_allclose(logits(policy.model), expected, rtol=1e-4, atol=1e-4)
    assert DoRALinear.__call__ is original
    with pytest.raises(ZeroDivisionError), fixed_norms(policy.model):
        _ = 1 / 0
    assert DoRALinear.__call__ is original, "also after an error"


# --- the base -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_base_bits_give_the_base_that_mlx_lm_converts_to(bits, tmp_path):
    # The embedding, which is also the output head, has rows of 128 = 2 · 64 numbers and is quantised too.
    ours = dict(tree_flatten(load_base(settings(base_bits=bits)).model.parameters()))
    folder = mlx_lms_quantised(tmp_path / "small", bits)
    theirs = dict(tree_flatten(load_base(settings(model_name=folder)).model.parameters()))
    assert ours.keys() == theirs.keys()
    assert "model.embed_tokens.scales" in ours
    for name, array in ours.items():
        assert mx.array_equal(array, theirs[name]), name


def test_a_models_own_choice_of_bits_is_respected():
    # qwen3_moe keeps the routers of its experts at 8 bits; an adapter moves them one level down in the names.
    for adapter in (False, True):
        policy = random_policy("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
        if adapter:
            add_adapter(policy.model, ModelConfig(fine_tune_type="lora"), 0)
        policy.quantize(4)
        bits = {
            name.removesuffix(".linear").rpartition(".")[2]: module.bits
            for name, module in policy.model.named_modules()
            if hasattr(module, "bits")
        }
        assert bits["gate"] == 8
        assert bits["q_proj"] == bits["up_proj"] == 4


def test_base_bits_of_a_quantised_folder_are_refused(tmp_path):
    folder = mlx_lms_quantised(tmp_path / "small", 4)
    with pytest.raises(ConfigError, match=r"model\.base_bits: must be 0 .* quantised already, got 8"):
        load_policy(settings(model_name=folder, base_bits=8), seed=0)


def test_a_quantised_folder_is_refused_for_full_training_but_can_be_evaluated(tmp_path):
    folder = mlx_lms_quantised(tmp_path / "small", 4)
    with pytest.raises(ConfigError, match=r'nothing but its norms and biases; set fine_tune_type = "lora"'):
        load_policy(settings("full", model_name=folder), seed=0)
    model, _ = mlx_lm.load(folder)
    model.set_dtype(mx.float32)
    scored = load_candidate(Candidate("small", tmp_path / "small"), Config(model=settings("full")))
    np.testing.assert_array_equal(logits(scored.model), logits(model))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_worker_and_learner_have_the_same_quantised_base(kind):
    learner, worker = (load_policy(settings(kind, base_bits=4), seed=seed) for seed in (0, 1))
    assert learner.identity.mismatch(worker.identity) is None
    shifted(learner)
    worker.load_trainable(unpack(*pack(freeze(1, learner.trainable()), 1024)))
    [[sample]] = sample_groups(worker, [PROMPT], [[3]], SamplingParams(24))
    learners, _ = completion_logprobs(
        learner.model,
        mx.array([[*PROMPT, *sample.tokens]]),
        mx.array([len(PROMPT) - 1]),
        mx.array([sample.tokens]),
        1.0,
    )
    np.testing.assert_allclose(sample.logprobs, np.array(learners)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "keys", "bits"),
    [
        *[(kind, (), bits) for kind in ADAPTERS for bits in (0, 4)],
        ("lora", ("model.embed_tokens",), 4),
        ("dora", ("model.embed_tokens",), 0),
    ],
)
def test_an_adapter_does_not_change_the_identity_of_the_base(kind, keys, bits):
    bare = load_base(settings(base_bits=bits)).identity
    assert (
        bare.mismatch(shifted(load_policy(settings(kind, base_bits=bits, lora_keys=keys), seed=0)).identity)
        is None
    )
    assert bare.mismatch(load_base(settings(base_bits=8)).identity)


# --- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [5, 999])
def test_more_adapter_layers_than_the_model_has_are_refused_with_its_number(layers):
    with pytest.raises(ConfigError, match=rf"lora_layers: must be at most 4, .* got {layers}"):
        load_policy(settings(lora_layers=layers), seed=0)
    assert load_policy(settings(lora_layers=4), seed=0).trainable()


@pytest.mark.parametrize("keys", [("attention.query",), ("self_attn.q_proj", "attention.query")])
def test_any_key_that_matches_nothing_is_refused_with_the_keys_that_would_match(keys):
    with pytest.raises(ConfigError, match="lora_keys") as caught:
        load_policy(settings(lora_keys=keys), seed=0)
    rule, _, listed = str(caught.value).partition("name some of ")
    assert "attention.query" in rule
    assert listed == (
        "mlp.down_proj, mlp.gate_proj, mlp.up_proj, "
        "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj, model.embed_tokens"
    ), "norms and blocks cannot carry an adapter"


def test_dora_on_layers_without_a_dora_variant_is_refused_before_anything_is_built():
    experts = random_policy("qwen3_moe").model
    with pytest.raises(ConfigError, match=r'switch_mlp.*"dora" fits; name some of .*self_attn\.q_proj'):
        add_adapter(experts, ModelConfig(fine_tune_type="dora"), 0)
    add_adapter(experts, ModelConfig(fine_tune_type="dora", lora_keys=("self_attn.q_proj",)), 0)
    with pytest.raises(ConfigError, match="embed_tokens"):
        load_policy(settings("dora", base_bits=4, lora_keys=("model.embed_tokens",)), seed=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_joined_projection_whose_adapter_mlx_lm_cannot_load_is_refused_by_name(kind):
    joined = random_policy("afm7").model
    with pytest.raises(ConfigError, match=r"self_attn\.qkv_proj: .* name some of .*self_attn\.out_proj"):
        add_adapter(joined, ModelConfig(fine_tune_type=kind), 0)
    add_adapter(joined, ModelConfig(fine_tune_type=kind, lora_keys=("self_attn.out_proj",)), 0)


@pytest.mark.parametrize("keys", [("model.embed_tokens",), ("self_attn.q_proj", "model.embed_tokens")])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_worker_with_fewer_bits_takes_adapters_of_any_kind_on_any_layer(kind, keys):
    worker = shifted(load_policy(settings(kind, lora_keys=keys), seed=0))
    exact = logits(worker.model)
    worker.quantize(8)
    assert 0 < np.abs(logits(worker.model) - exact).max() < 0.5


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["stored", "quantised folder", "base_bits"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_mlx_lm_loads_an_adapter_onto_the_base_that_it_names(kind, base, run_dir, tmp_path):
    folder = str(EMBEDDED) if base == "stored" else mlx_lms_quantised(tmp_path / "small", 4)
    model = settings(
        kind,
        model_name=folder if base == "quantised folder" else "tiny",
        base_bits=4 if base == "base_bits" else 0,
        lora_layers=3,
        lora_keys=("self_attn.q_proj", "mlp.down_proj"),
    )
    policy = shifted(load_policy(model, seed=0))
    checkpoint = saved(policy, run_dir)
    described = json.loads((checkpoint / "adapter_config.json").read_text())
    assert described["fine_tune_type"] == kind
    assert described["num_layers"] == 3
    assert described["model"] == (folder if base == "quantised folder" else str(EMBEDDED))
    # A base that is quantised on loading is stored nowhere; base_quantization says how to make it.
    assert described.get("base_quantization") == (
        {"group_size": 64, "bits": 4} if base == "base_bits" else None
    )
    loaded, _ = mlx_lm.load(folder, adapter_path=str(checkpoint))
    loaded.set_dtype(mx.float32)
    np.testing.assert_allclose(logits(loaded), logits(policy.model), atol=1e-4)


@pytest.mark.parametrize(("kind", "bits"), [("lora", 4), ("dora", 0), ("dora", 8)])
def test_the_evaluator_uses_an_adapters_own_base_and_scale_independent_of_the_settings(kind, bits, run_dir):
    model = settings(kind, base_bits=bits)  # lora_scale is 20
    policy = shifted(load_policy(model, seed=0))
    checkpoint = Candidate("checkpoint", saved(policy, run_dir))
    other = {"lora": "dora", "dora": "lora"}[kind]
    for asked in (model, settings(other, base_bits=bits), settings(kind, lora_scale=1.0)):
        scored = load_candidate(checkpoint, Config(model=asked))
        scored.model.set_dtype(mx.float32)
        np.testing.assert_allclose(logits(scored.model), logits(policy.model), atol=1e-4)


@pytest.mark.parametrize(("kind", "bits"), [("lora", 4), ("dora", 0), ("dora", 8)])
def test_settings_that_differ_from_those_of_the_checkpoints_adapter_are_refused(kind, bits, run_dir):
    folder = saved(load_policy(settings(kind, base_bits=bits), seed=0), run_dir)
    check_adapter(folder, settings(kind, base_bits=bits))
    other = {"lora": "dora", "dora": "lora"}[kind]
    with pytest.raises(ConfigError, match=rf"model\.fine_tune_type = {kind} and model\.model_name"):
        check_adapter(folder, settings(other, base_bits=bits))
    with pytest.raises(ConfigError, match=r"model\.lora_scale = 20\.0 and model\.model_name"):
        check_adapter(folder, settings(kind, base_bits=bits, lora_scale=1.0))
    with pytest.raises(ConfigError, match=rf"model\.base_bits = {bits} and model\.model_name"):
        check_adapter(folder, settings(kind, base_bits=8 if bits == 4 else 4))
