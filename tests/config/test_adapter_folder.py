"""What an adapter's folder says is read as settings, without its arrays."""

import json
import math

import pytest

from grpo_actors.config import Config, ModelConfig, load_config
from grpo_actors.config.adapter_folder import check_start, read_adapter
from grpo_actors.config.peft_folder import PREFIX
from grpo_actors.errors import ConfigError, ModelError

PARAMETERS = {"rank": 4, "scale": 2, "keys": ["self_attn.q_proj"]}
MLX_LM = {"num_layers": 3, "lora_parameters": PARAMETERS}
SETTINGS = {
    "fine_tune_type": "lora",
    "base_bits": 0,
    "lora_layers": 3,
    "lora_rank": 4,
    "lora_scale": 2.0,
    "lora_keys": ("self_attn.q_proj",),
}
PEFT = {"peft_type": "LORA", "lora_alpha": 8}


@pytest.fixture
def mlx_lm(tmp_path):
    """Write an adapter of mlx-lm."""

    def _write(described):
        (tmp_path / "adapters.safetensors").touch()
        (tmp_path / "adapter_config.json").write_text(
            described if isinstance(described, str) else json.dumps(described)
        )
        return tmp_path

    return _write


@pytest.fixture
def peft(tmp_path):
    """Write a PEFT adapter whose file lists arrays of these names, each with its rank."""

    def _write(ranks, **described):
        arrays = {PREFIX + name: {"shape": [rank, 16]} for name, rank in ranks.items()}
        header = json.dumps({"__metadata__": {"format": "pt"}, **arrays}).encode()
        (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | described))
        return tmp_path

    return _write


def lora(*modules, rank=4):
    return {f"{module}.{end}.weight": rank for module in modules for end in ("lora_A", "lora_B")}


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        read_adapter(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("described", "changes"),
    [
        (MLX_LM, {}),
        (
            MLX_LM | {"fine_tune_type": "dora", "model": "base"},
            {"fine_tune_type": "dora", "model_name": "base"},
        ),
        (MLX_LM | {"model": ""}, {}),
        (MLX_LM | {"base_quantization": {"bits": 4}}, {"base_bits": 4}),
        (MLX_LM | {"base_quantization": {}}, {}),
        # mlx-lm takes all layers where their number is no positive one.
        (MLX_LM | {"num_layers": 1}, {"lora_layers": 1}),
        (MLX_LM | {"num_layers": 0}, {"lora_layers": -1}),
        (MLX_LM | {"num_layers": -1}, {"lora_layers": -1}),
        (MLX_LM | {"lora_parameters": {"rank": 4, "scale": 2}}, {"lora_keys": ()}),
        (MLX_LM | {"lora_parameters": PARAMETERS | {"keys": None}}, {"lora_keys": ()}),
    ],
)
def test_mlx_lms_description_is_read_as_mlx_lm_reads_it(mlx_lm, described, changes):
    found = read_adapter(mlx_lm(described))
    expected = SETTINGS | changes
    assert found.settings == expected
    assert (found.kind, found.peft) == (expected["fine_tune_type"], None)
    assert found.weights.name == "adapters.safetensors"


def test_whole_weights_that_are_stored_like_an_adapter_have_no_sizes(mlx_lm):
    found = read_adapter(mlx_lm({"fine_tune_type": "full", "model": "base"}))
    assert (found.kind, found.settings) == ("full", {"model_name": "base", "fine_tune_type": "full"})


@pytest.mark.parametrize(
    ("described", "what"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "'list' object has no attribute 'get'"),
        ({"fine_tune_type": "full?"}, "fine_tune_type must be lora, dora or full, got full?"),
        ({"lora_parameters": PARAMETERS}, "'num_layers' is missing"),
        (MLX_LM | {"num_layers": "3"}, "'>' not supported between instances of 'str' and 'int'"),
    ],
)
def test_a_description_that_is_none_is_refused_in_one_line(mlx_lm, described, what):
    folder = mlx_lm(described)
    assert refusal(folder) == f"{folder}/adapter_config.json: does not describe an adapter: {what}"


def test_an_adapter_has_arrays_and_a_description(tmp_path):
    neither = f"{tmp_path}: no adapter folder (neither adapters.safetensors nor PEFT's adapter_model.safetensors found)"
    assert refusal(tmp_path) == neither
    (tmp_path / "adapter_model.bin").touch()
    assert refusal(tmp_path).startswith(f"{neither}; adapter_model.bin is a pickle")
    for weights in ("adapter_model.safetensors", "adapters.safetensors"):
        (tmp_path / weights).touch()
        assert refusal(tmp_path) == f"{tmp_path}: no adapter folder (adapter_config.json not found)"


Q, V = (
    ["model.layers.0.self_attn." + name, "model.layers.1.self_attn." + name] for name in ("q_proj", "v_proj")
)


@pytest.mark.parametrize(
    ("arrays", "described", "changes"),
    [
        (lora(*Q), {}, {"lora_keys": ("self_attn.q_proj",)}),
        (lora(*Q), {"base_model_name_or_path": "base"}, {"model_name": "base"}),
        (lora(*Q), {"use_dora": True}, {"fine_tune_type": "dora"}),
        # alpha / √rank = 8 / √4
        (lora(*Q), {"use_rslora": True}, {"lora_scale": 4.0}),
        # The largest rank, and the scale of the modules that have it: 8 / 8.
        (lora(*Q) | lora(*V, rank=8), {}, {"lora_rank": 8, "lora_scale": 1.0}),
        # Of the patterns that fit, the first counts; a pattern is the end of a name, from a dot on.
        (lora(*Q), {"alpha_pattern": {"proj": 1, "q_proj": 16, ".*": 2}}, {"lora_scale": 4.0}),
        (lora("model.embed"), {"alpha_pattern": {"embed": 2}}, {"lora_scale": 0.5}),
        # All layers have the same: names within a layer; else whole names.
        (lora(*V, *Q), {}, {"lora_keys": ("self_attn.q_proj", "self_attn.v_proj")}),
        (lora(*Q, V[0]), {}, {"lora_keys": tuple(sorted([*Q, V[0]]))}),
        (lora(V[0], *Q), {}, {"lora_keys": tuple(sorted([*Q, V[0]]))}),
        (lora(*Q), {"layers_to_transform": [0, 1]}, {"lora_keys": tuple(Q)}),
        (lora(*Q), {"target_modules": ".*q_proj"}, {"lora_keys": tuple(Q)}),
        (lora(*Q), {"target_modules": ["q_proj"]}, {"lora_keys": ("self_attn.q_proj",)}),
        # Modules outside of the layers.
        (lora("lm_head", *Q), {}, {"lora_keys": ("lm_head", "self_attn.q_proj")}),
        (lora("lm_head"), {}, {"lora_keys": ("lm_head",)}),
        (
            {"embed.lora_embedding_A": 2, "embed.lora_embedding_B": 16, "embed.base_layer.weight": 16},
            {},
            {"lora_rank": 2, "lora_scale": 4.0, "lora_keys": ("embed",)},
        ),
        (lora("lm_head") | {"lm_head.lora_magnitude_vector": 16}, {}, {"lora_keys": ("lm_head",)}),
        (lora("lm_head") | {"lm_head.lora_magnitude_vector.weight": 16}, {}, {"lora_keys": ("lm_head",)}),
    ],
)
def test_pefts_description_is_read_as_what_peft_computes(peft, arrays, described, changes):
    found = read_adapter(peft(arrays, **described))
    expected = {"fine_tune_type": "lora", "lora_rank": 4, "lora_scale": 2.0, "lora_layers": -1} | changes
    assert {key: value for key, value in found.settings.items() if key in expected} == expected
    assert ("model_name" in found.settings) == ("model_name" in changes)
    assert found.kind == expected["fine_tune_type"]
    assert found.weights.name == "adapter_model.safetensors"


def test_each_module_of_peft_has_its_own_scale(peft):
    ranks = lora(*Q) | lora(*V, rank=2)
    adapter = read_adapter(peft(ranks, alpha_pattern={"v_proj": 3})).peft
    assert adapter.ranks == dict.fromkeys(Q, 4) | dict.fromkeys(V, 2)
    assert [adapter.scale(module) for module in (Q[0], V[1])] == [8 / 4, 3 / 2]
    adapter = read_adapter(peft(ranks, use_rslora=True)).peft
    assert [adapter.scale(module) for module in (Q[0], V[1])] == [8 / math.sqrt(4), 8 / math.sqrt(2)]


@pytest.mark.parametrize(
    ("arrays", "described", "what"),
    [
        (lora(*Q), {"peft_type": "IA3"}, "a PEFT adapter with peft_type IA3; only plain LoRA and DoRA"),
        (lora(*Q), {"lora_bias": True}, "a PEFT adapter with lora_bias = True; only plain LoRA and DoRA"),
        (lora(*Q) | {"lm_head.weight": 1}, {}, "base_model.model.lm_head.weight is no LoRA matrix"),
        ({}, {}, "adapter_model.safetensors has no LoRA matrices"),
    ],
)
def test_what_mlx_lm_cannot_represent_is_refused(peft, arrays, described, what):
    folder = peft(arrays, **described)
    assert refusal(folder).startswith(f"{folder}: {what}")


def test_a_file_of_peft_without_a_header_is_refused(peft):
    folder = peft(lora(*Q))
    (folder / "adapter_model.safetensors").write_bytes((99).to_bytes(8, "little") + b"{}")
    what = "adapter_model.safetensors is not a safetensors file, or is cut off"
    assert refusal(folder) == f"{folder}/adapter_config.json: does not describe an adapter: {what}"


def test_mlx_lms_arrays_win_over_pefts(peft, mlx_lm):
    peft(lora(*Q))
    assert read_adapter(mlx_lm(MLX_LM)).peft is None


def start(folder, **settings):
    return check_start(ModelConfig(adapter_path=str(folder), **settings))


SAME = {key: value for key, value in SETTINGS.items() if key != "base_bits"}


@pytest.mark.parametrize(
    ("key", "other", "rule"),
    [
        ("lora_rank", 8, "must be 4"),
        ("lora_scale", 20.0, "must be 2.0"),
        ("lora_layers", -1, "must be 3"),
        ("lora_keys", ("x",), r"must be \('self_attn.q_proj',\)"),
    ],
)
def test_an_adapter_is_trained_on_only_with_its_own_sizes(mlx_lm, key, other, rule):
    folder = mlx_lm(MLX_LM)
    assert start(folder, **SAME) == read_adapter(folder)
    with pytest.raises(ConfigError, match=rf"^model\.{key}: {rule}, as in .*, got .*; leave it out$"):
        start(folder, **SAME | {key: other})
    # Added to the weights it has no size any more.
    assert start(folder, **SAME | {key: other, "fine_tune_type": "full"}).kind == "lora"


def test_an_adapter_is_trained_on_only_as_its_own_kind(mlx_lm, tmp_path, monkeypatch):
    folder = mlx_lm(MLX_LM | {"fine_tune_type": "dora"})
    with pytest.raises(ConfigError) as caught:
        start(folder, **SAME)
    assert str(caught.value) == (
        f'model.adapter_path: {folder} is of the kind dora; set fine_tune_type = "dora" to train it on, '
        'or "full" to add it to the weights and train those'
    )
    folder = mlx_lm({"fine_tune_type": "full"})
    with pytest.raises(ConfigError, match=r'is of the kind full; set fine_tune_type = "full"$'):
        start(folder, **SAME)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert start("~").path == folder


def test_of_the_folders_that_are_named_the_last_one_counts_and_an_empty_name_is_none(
    mlx_lm, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    mlx_lm(MLX_LM | {"model": "base"})
    (tmp_path / "mine.toml").write_text('adapter_path = "nowhere"')
    loaded = load_config("mine.toml", ["adapter_path=."])
    assert (loaded.config.model.model_name, loaded.config.model.lora_rank) == ("base", 4)
    assert loaded.origins["model.model_name"] == "adapter ."
    assert load_config("mine.toml", ["adapter_path="]).config == Config()
    with pytest.raises(ConfigError, match=r"^argument: model\.adapter_path must be text in quotes, got 3"):
        load_config(None, [], {"adapter_path": 3})


def test_a_saved_configuration_has_what_its_adapter_said_and_does_not_read_it_again(mlx_lm, tmp_path):
    folder = mlx_lm(MLX_LM)
    loaded = load_config(None, [f"adapter_path={folder}"])
    (tmp_path / "config.json").write_text(loaded.config.model_dump_json())
    (folder / "adapters.safetensors").unlink()
    assert load_config(tmp_path / "config.json").config == loaded.config


def test_a_contradiction_in_what_nobody_wrote_by_hand_is_that_of_the_setting_it_is_about(mlx_lm, tmp_path):
    folder = mlx_lm(MLX_LM | {"base_quantization": {"bits": 4}})
    (tmp_path / "config.json").write_text('{"model": {"fine_tune_type": "full"}}')
    with pytest.raises(ConfigError, match=r"^adapter .*: model\.base_bits must be 0 when fine_tune_type"):
        load_config(tmp_path / "config.json", [], {"adapter_path": str(folder)})
