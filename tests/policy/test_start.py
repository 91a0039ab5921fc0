"""Training that starts from an adapter: PEFT's, and all kinds of mlx-lm."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from architectures import random_policy
from mlx import nn
from mlx.utils import tree_flatten
from written import write_checkpoint

from grpo_actors.config import Config, ModelConfig, load_config
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.policy import peft
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_base, load_policy
from grpo_actors.policy.peft import to_peft
from grpo_actors.policy.training import Training
from grpo_actors.rundir.checkpoint_weights import read_model
from grpo_actors.rundir.naming import open_policy

TOKENS = mx.array([[2, 21, 22, 15, 23, 24, 1, 3, 9, 9]])
PREFIX = "base_model.model."


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


def normal(seed, *shape):
    return 0.05 * np.random.default_rng(seed).standard_normal(shape, np.float32)


def start(folder, *more):
    """The policy of a configuration that names nothing but the adapter's folder."""
    return load_policy(
        load_config(None, [f"adapter_path={folder}", "dtype=float32", *more]).config.model, seed=0
    )


# --- PEFT -----------------------------------------------------------------------------------------


class PeftFolder:
    """A PEFT adapter of the embedded model, made by PEFT's formulas, and the dense weights that it means."""

    def __init__(self, path, ranks, *, dora=False, **described):
        self.path = path
        self.dense = {}
        self.arrays = {}
        base = dict(tree_flatten(load_base(ModelConfig(dtype="float32")).model.parameters()))
        self.described = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(EMBEDDED),
            "r": 4,
            "lora_alpha": 8,
            "use_dora": dora,
            "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        } | described
        for number, (name, (rank, scale)) in enumerate(ranks.items()):
            weight = np.array(base[f"{name}.weight"])
            a, b = normal(2 * number, rank, weight.shape[1]), normal(2 * number + 1, weight.shape[0], rank)
            adapted = weight + scale * b @ a
            self.arrays |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
            if dora:
                magnitude = 1.0 + normal(number, weight.shape[0])
                self.arrays[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude
                adapted = magnitude[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
            self.dense[f"{name}.weight"] = adapted
        self.write()

    def write(self):
        self.path.mkdir(exist_ok=True)
        arrays = {name: mx.array(array) for name, array in self.arrays.items()}
        mx.save_safetensors(str(self.path / "adapter_model.safetensors"), arrays, metadata={"format": "pt"})
        (self.path / "adapter_config.json").write_text(json.dumps(self.described))

    @property
    def logits(self):
        model = load_base(ModelConfig(dtype="float32")).model
        model.load_weights([(name, mx.array(array)) for name, array in self.dense.items()], strict=False)
        return logits(model)


def modules(*names, layers=range(4)):
    return [f"model.layers.{layer}.{name}" for layer in layers for name in names]


PLAIN = dict.fromkeys(modules("self_attn.q_proj", "mlp.down_proj"), (4, 2.0))
#: With use_rslora the scale is alpha / √rank: 8 / √4 = 4, and for v_proj of rank 1 and alpha 3: 3.
PATTERN = dict.fromkeys(modules("self_attn.q_proj"), (4, 4.0)) | dict.fromkeys(
    modules("self_attn.v_proj"), (1, 3.0)
)
SOME = dict.fromkeys(modules("self_attn.q_proj", layers=(1, 2)), (4, 2.0))
CASES = {
    "lora": (PLAIN, {}),
    "dora": (PLAIN, {"dora": True}),
    "own ranks and scales": (
        PATTERN,
        {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    ),
    "some layers": (SOME, {"layers_to_transform": [1, 2]}),
}


@pytest.mark.parametrize("more", [(), ("fine_tune_type=full",)], ids=["trained on", "merged"])
@pytest.mark.parametrize("case", CASES)
def test_training_starts_from_what_a_peft_adapter_computes(case, more, tmp_path):
    ranks, described = CASES[case]
    folder = PeftFolder(tmp_path / "peft", ranks, **described)
    policy = start(folder.path, *more)
    np.testing.assert_allclose(logits(policy.model), folder.logits, rtol=1e-5, atol=5e-5)
    assert np.abs(logits(policy.model) - logits(load_base(ModelConfig(dtype="float32")).model)).max() > 0.1
    adapted = {name.removesuffix(".lora_a") for name in policy.trainable() if name.endswith(".lora_a")}
    assert adapted == (set() if more else {*ranks})


def test_the_folder_itself_says_base_kind_and_sizes_and_more_is_not_needed(tmp_path):
    folder = PeftFolder(tmp_path / "peft", PLAIN)
    model = load_config(None, [f"adapter_path={folder.path}"]).config.model
    assert (model.model_name, model.fine_tune_type) == (str(EMBEDDED), "lora")
    assert (model.lora_rank, model.lora_scale, model.lora_layers) == (4, 2.0, -1)
    assert model.lora_keys == ("mlp.down_proj", "self_attn.q_proj")
    named = load_config(None, [f"adapter_path={folder.path}", "model_name=tiny"]).config.model
    assert named.model_name == "tiny", "the user may have the base elsewhere"
    with pytest.raises(ConfigError, match=r"model\.lora_rank: must be 4, as in .*peft, got 16; leave it out"):
        load_config(None, [f"adapter_path={folder.path}", "lora_rank=16"])
    with pytest.raises(
        ConfigError, match=r'is of the kind lora; set fine_tune_type = "lora" to train it on, or "full"'
    ):
        load_config(None, [f"adapter_path={folder.path}", "fine_tune_type=dora"])


def test_the_tools_open_a_peft_folder_too(tmp_path):
    folder = PeftFolder(tmp_path / "peft", PLAIN)
    policy = open_policy("tiny", str(folder.path))
    policy.model.set_dtype(mx.float32)
    np.testing.assert_allclose(logits(policy.model), folder.logits, rtol=1e-5, atol=0.05)


@pytest.mark.parametrize(
    ("arrays", "described", "rule"),
    [
        (
            {f"{PREFIX}lm_head.weight": np.zeros((2, 2))},
            {},
            r"lm_head\.weight is no LoRA matrix .* merge_and_unload",
        ),
        ({}, {"peft_type": "IA3"}, "a PEFT adapter with peft_type IA3; only plain LoRA and DoRA"),
        ({}, {"lora_bias": True}, "a PEFT adapter with lora_bias = True"),
        ({}, {"lora_alpha": None}, "does not describe an adapter"),
        (
            {f"{PREFIX}model.layers.0.mlp.fc1.lora_A.weight": np.zeros((4, 128))},
            {},
            r"model\.lora_keys: .*mlp\.fc1.*: no modules",
        ),
        (
            {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight": np.zeros((64, 4))},
            {},
            r"does not fit the model: model\.layers\.0\.self_attn\.q_proj\.lora_b is \(4, 64\), not \(4, 128\)",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(arrays, described, rule, tmp_path):
    folder = PeftFolder(tmp_path / "peft", PLAIN)
    folder.arrays |= {name: array.astype(np.float32) for name, array in arrays.items()}
    folder.described |= described
    folder.write()
    with pytest.raises((ConfigError, ModelError), match=rule) as caught:
        start(folder.path)
    assert "\n" not in str(caught.value)


def test_a_pickled_adapter_and_an_empty_folder_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no adapter folder \(neither adapters\.safetensors nor PEFT's"):
        start(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ModelError, match="is a pickle: save it again with peft"):
        start(tmp_path)


# --- mlx-lm ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A folder of a small model with experts."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    folder.mkdir()
    policy = random_policy("qwen3_moe", vocab_size=320)
    mlx_lm.utils.save_model(folder, policy.model)
    mlx_lm.utils.save_config(dict(policy.architecture), folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    return str(folder)


KINDS = {
    "LoRALinear": ("lora", ("self_attn.q_proj",)),
    "LoRASwitchLinear": ("lora", ("mlp.switch_mlp.up_proj",)),
    "LoRAEmbedding": ("lora", ("model.embed_tokens",)),
    "DoRALinear": ("dora", ("self_attn.q_proj",)),
    "DoRAEmbedding": ("dora", ("model.embed_tokens",)),
}


def shifted(policy):
    """Move all trainable arrays, so that each matters; returns the policy."""
    moved = {
        name: array + mx.array(normal(number, *array.shape))
        for number, (name, array) in enumerate(sorted(policy.trainable().items()))
    }
    policy.load_trainable(moved)
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_reads_every_kind_of_adapter_that_a_run_writes_and_another_run_starts_from_it(
    kind, experts, run_dir
):
    fine_tune_type, keys = KINDS[kind]
    model = ModelConfig(
        model_name=experts, dtype="float32", fine_tune_type=fine_tune_type, lora_rank=4, lora_keys=keys
    )
    policy = shifted(load_policy(model, seed=0))
    assert kind in {type(module).__name__ for module in policy.model.modules()}
    training = Training(policy.model, Config().learner, lambda *_: None)
    folder = write_checkpoint(run_dir, 1, policy, training, {}).path
    loaded, _ = mlx_lm.load(experts, adapter_path=str(folder))
    np.testing.assert_allclose(logits(loaded), logits(policy.model), rtol=1e-5, atol=1e-5)
    for more in ((), ("fine_tune_type=full",)):
        started = start(folder, *more)
        np.testing.assert_allclose(logits(started.model), logits(policy.model), rtol=1e-4, atol=1e-4)
        assert started.has_adapter is not bool(more)
    assert started.trainable().keys() == dict(tree_flatten(load_base(model).model.parameters())).keys()


def test_mlx_lms_full_adapter_may_hold_some_weights_only(tmp_path):
    base = load_base(ModelConfig(dtype="float32"))
    name = "model.layers.3.mlp.up_proj.weight"
    changed = dict(tree_flatten(base.model.parameters()))[name] + 0.1
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {name: changed})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "model": "tiny"}))
    expected, _ = mlx_lm.load(str(EMBEDDED), adapter_path=str(tmp_path))
    expected.set_dtype(mx.float32)
    policy = start(tmp_path)
    assert not policy.has_adapter
    np.testing.assert_allclose(logits(policy.model), logits(expected), rtol=1e-5, atol=1e-4)
    with pytest.raises(ConfigError, match='is of the kind full; set fine_tune_type = "full"'):
        start(tmp_path, "fine_tune_type=lora")


# --- for peft -------------------------------------------------------------------------------------


def written_for_peft(folder, **settings):
    policy = shifted(load_policy(ModelConfig(**({"dtype": "float32", "lora_rank": 4} | settings)), seed=0))
    arrays, described = to_peft(policy.model, str(policy.source), set(read_model(policy.source)))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return policy, described


WRITTEN = [
    (
        {"fine_tune_type": "lora"},
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    ({"fine_tune_type": "dora", "lora_keys": ("self_attn.q_proj",)}, ["q_proj"]),
    (
        {"fine_tune_type": "lora", "lora_layers": 2, "lora_keys": ("self_attn.q_proj",)},
        ["model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj"],
    ),
]


@pytest.mark.parametrize(("settings", "targets"), WRITTEN)
def test_what_is_written_for_peft_is_read_back_to_the_same_policy(settings, targets, tmp_path):
    policy, described = written_for_peft(tmp_path / "peft", **settings)
    assert described["target_modules"] == targets
    assert (described["r"], described["lora_alpha"]) == (4, 80.0)
    if "lora_layers" in settings:  # peft has no count of layers from the last: they have whole names
        described["layers_to_transform"] = [2, 3]
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(described))
    again = start(tmp_path / "peft")
    assert again.trainable().keys() == policy.trainable().keys()
    np.testing.assert_array_equal(logits(again.model), logits(policy.model))


def test_a_tied_embeddings_adapter_is_written_as_two_and_what_peft_has_not_is_refused(experts, tmp_path):
    _, described = written_for_peft(
        tmp_path / "tied", fine_tune_type="lora", lora_keys=("model.embed_tokens",)
    )
    assert described["target_modules"] == ["embed_tokens", "lm_head"]
    arrays = mx.load(str(tmp_path / "tied" / "adapter_model.safetensors"))
    token_rows, outputs = (
        arrays[f"{PREFIX}{end}"] for end in ("model.embed_tokens.lora_embedding_A", "lm_head.lora_B.weight")
    )
    assert mx.array_equal(token_rows.T, outputs)
    with pytest.raises(
        ModelError, match=r"peft has no counterpart of .*switch_mlp\.up_proj, a LoRASwitchLinear"
    ):
        written_for_peft(
            tmp_path / "experts",
            model_name=experts,
            fine_tune_type="lora",
            lora_keys=("mlp.switch_mlp.up_proj",),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        *(settings for settings, _ in WRITTEN),
        {"fine_tune_type": "lora", "lora_keys": ("model.embed_tokens",)},
    ],
)
def test_peft_computes_the_same_logits(settings, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    policy, _ = written_for_peft(tmp_path / "peft", **settings)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32).eval()
    with torch.no_grad():
        computed = theirs(torch.tensor(TOKENS.tolist())).logits.numpy()
    np.testing.assert_allclose(logits(policy.model), computed, rtol=1e-5, atol=5e-5)


def test_a_peft_adapter_with_another_embedding_is_refused():
    embedding = nn.Embedding(6, 4)
    peft._check_copy("embed", embedding, None)
    peft._check_copy("embed", embedding, embedding.weight.astype(mx.bfloat16))
    for other in (embedding.weight + 0.1, mx.zeros((7, 4))):
        with pytest.raises(ModelError, match=r"^embed: the PEFT folder has another embedding"):
            peft._check_copy("embed", embedding, other)
