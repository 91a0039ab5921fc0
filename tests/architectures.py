"""Small random models of every architecture that mlx-lm has.

A config.json is made from the fields that mlx-lm's module reads: `_VALUES` has one small value for each name of a field,
`_OWN` the exceptions of a module. Fields that neither names keep mlx-lm's default.
"""

import contextlib
import dataclasses
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path

from grpo_actors.config import ModelConfig
from grpo_actors.policy.model import Policy

VOCABULARY = 64
STOP = 63


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_VOCABULARIES = ("vocab_size", "num_vocab", "vocab_size_per_layer_input")
#: Name of a field -> its value. Two layers, four heads, two key heads, four experts of which a token uses two.
_VALUES: dict[str, Any] = {
    **dict.fromkeys(_VOCABULARIES, VOCABULARY),
    **_each(
        32,
        "hidden_size hidden_dim model_dim d_model n_embd dim_model_base block_dim mamba_d_ssm n_inner moe_hidden_size",
    ),
    **_each(
        64,
        "intermediate_size moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size ff_intermediate_size "
        "intermediate_size_mlp dense_intermediate_size share_expert_dim block_ff_dim",
    ),
    **_each(2, "num_hidden_layers num_layers num_transformer_layers n_layers n_layer"),
    **_each(
        4, "num_attention_heads num_heads n_heads n_head swa_num_attention_heads num_swa_attention_heads"
    ),
    **_each(
        2,
        "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups swa_num_key_value_heads "
        "num_swa_key_value_heads num_global_key_value_heads",
    ),
    **_each(
        8,
        "head_dim swa_head_dim swa_v_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim hidden_size_per_head "
        "kv_channels rotary_dim query_pre_attn_scalar global_head_dim hidden_size_per_layer_input",
    ),
    **_each(
        1e-5,
        "rms_norm_eps layer_norm_eps norm_eps post_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon",
    ),
    **_each(
        512,
        "max_position_embeddings original_max_position_embeddings n_positions n_ctx block_size model_max_length",
    ),
    **_each(10000.0, "rope_theta rotary_emb_base swa_rope_theta rope_local_base_freq"),
    **_each(None, "rope_scaling"),
    **_each(0.5, "partial_rotary_factor rotary_pct"),
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    # A window of fewer tokens than a prompt has, in every second layer.
    **_each(8, "sliding_window window_size attention_window_size sliding_window_size loop_window_size"),
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    # Multi-head latent attention, and its index of tokens: as many as it may choose.
    **_each(16, "kv_lora_rank q_lora_rank o_lora_rank"),
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    **_each(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    **_each(
        1,
        "num_shared_experts n_shared_experts num_shared_expert moe_num_shared_experts zero_expert_num n_group topk_group "
        "first_k_dense_replace num_dense_layers moe_layer_freq decoder_sparse_step",
    ),
    "mlp_only_layers": [],
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    # Linear attention, convolutions and state spaces.
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    **_each(8, "linear_key_head_dim linear_value_head_dim"),
    **_each(4, "linear_conv_kernel_dim conv_kernel mamba_d_conv short_conv_kernel_size conv1d_width"),
    "conv_L_cache": 3,
    "conv_window": 2,
    **_each(8, "state_size ssm_state_size mamba_d_state mamba_d_head mamba_head_dim"),
    **_each(4, "mamba_num_heads mamba_n_heads time_step_rank mamba_dt_rank"),
    **_each(1, "n_groups mamba_n_groups group_norm_size"),
    "time_step_limit": (0.001, 100.0),
    "mamba_expand": 2,
    **_each(8, "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim"),
    **_each(1.0, "logits_scaling embedding_multiplier residual_multiplier scale_emb output_multiplier"),
    "attention_multiplier": 0.35,
    "scale_depth": 1.4,
    **_each(30.0, "final_logit_softcapping logits_soft_cap"),
    "hidden_act": "silu",
    **_each(
        False,
        "tie_word_embeddings attention_bias mlp_bias use_bias norm_head conv_bias mamba_proj_bias use_cla "
        "add_swa_attention_sink_bias add_full_attention_sink_bias linear_allow_neg_eigval",
    ),
    **_each(
        True,
        "use_qk_norm qk_norm post_norm norm_topk_prob use_expert_bias use_conv_bias use_qkv_bias mamba_conv_bias "
        "mla_scale_q_lora mla_scale_kv_lora",
    ),
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 1.0,
    "original_max_position_embeddings": 512,
    "llama_4_scaling_beta": 0.1,
    "mscale_all_dim": 1.0,
}
_KIMI = {
    "linear_attn_config": {
        "kda_layers": [1],
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
    }
}
_ROPE_OF_LAYERS = {"rope_parameters": dict.fromkeys(_VALUES["layer_types"], _VALUES["rope_parameters"])}
_FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": 2 * _VALUES["layer_types"]}
#: Module -> fields in which it differs from `_VALUES`.
_OWN: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [0]},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": {**_YARN, "type": "yarn"}},
    "ernie4_5_moe": {"moe_capacity": []},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "gemma3n": {
        **_FOUR_LAYERS,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {**_FOUR_LAYERS, "num_kv_shared_layers": 2, "rope_parameters": None},
    # transformers' configuration, which its tokenizer reads, wants mamba_expand · hidden_size channels in these heads.
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {"hidden_act": "situ", "activation_situ_beta": 1.0, **_KIMI},
    "kimi_linear": _KIMI,
    "lfm2": {
        "full_attn_idxs": [1],
        "layer_types": None,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"full_attn_idxs": [1], "layer_types": None},
    "lille-130m": {"n_embd": 128},
    # Its plain form; ministral3 has the windows.
    "llama": {"layer_types": None, "sliding_window": None},
    "mamba2": {"num_heads": 8},
    "llama4": {
        "num_hidden_layers": 4,
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mellum": _ROPE_OF_LAYERS,
    "mimo_v2_flash": {"hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1]},
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 512}},
    "minimax_m3_vl": {"layer_types": None, "moe_layer_freq": [0, 1]},
    "ministral3": {"rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "muse_spark": {"layer_rope_theta": [10000.0, 0.0], "num_shared_experts": 0},
    "nemotron-nas": {"block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}}] * 2},
    "nemotron_h": {
        "hybrid_override_pattern": "M*-E",
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mlp", "moe"],
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "openelm": {
        "ffn_dim_divisor": 16,
        "ffn_multipliers": [2.0, 2.0],
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
    },
    # Its factors for long contexts are those of the whole head.
    "phi3": {"partial_rotary_factor": 1.0},
    "phi3small": {"dense_attention_every_n_layers": 2, "gegelu_limit": 20.0},
    "plamo": {"n_shared_head": 2},
    "qwen3_5": {"num_experts": 0},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": None},
    "spark2_5": {**_ROPE_OF_LAYERS, "hidden_act": "gelu"},
}
#: Module -> module and class of the fields of its `text_config`.
_TEXT = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("ministral3", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}


@cache
def families() -> tuple[str, ...]:
    """Return the names of mlx-lm's modules with a class `Model`, in order; one that cannot be imported is among them."""
    names = sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return tuple(name for name in names if _has_model(name))


#: Fields that transformers needs for the tokenizer, and mlx-lm's module does not read.
_READ_BY_TRANSFORMERS = {"exaone4": {"layer_types": ["sliding_attention", "full_attention"]}}


def config_json(family: str, *, vocabulary: int = VOCABULARY, **changes: Any) -> dict[str, Any]:
    """Return the content of config.json of mlx-lm's module `family`."""
    changes = {name: vocabulary for name in _VOCABULARIES if vocabulary != VOCABULARY} | changes
    if family not in _TEXT:
        fields = _fields(family, "ModelArgs", family)
        return {"model_type": family, **fields, **_READ_BY_TRANSFORMERS.get(family, {}), **changes}
    module, fields = _TEXT[family]
    text = {"model_type": module, **_fields(module, fields, family), **changes}
    return {"model_type": family, "text_config": text, **_fields(family, "ModelArgs", ""), **changes}


def build(config: dict[str, Any], *, seed: int = 0) -> nn.Module:
    """Build mlx-lm's model of a config.json, with random weights in float32 whose logits are not almost uniform."""
    module = _module(config["model_type"])
    mx.random.seed(seed)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    sanitize = getattr(model, "sanitize", None)
    if (
        sanitize is not None and config["model_type"] == "gemma3_text"
    ):  # here it detects that its embeddings are tied
        sanitize({} if config.get("tie_word_embeddings") else dict(tree_flatten(model.parameters())))
    model.update(
        tree_map_with_path(
            lambda name, w: 3 * w if name.endswith("weight") and w.ndim == 2 else w, model.parameters()
        )
    )
    model.eval()
    mx.eval(model.parameters())
    return model


def random_policy(family: str, *, seed: int = 0, **changes: Any) -> Policy:
    """Build a policy of mlx-lm's module `family` with random weights; only `STOP` ends a completion."""
    config = config_json(family, **changes)
    tokenizer = SimpleNamespace(
        eos_token_ids={STOP},
        has_chat_template=False,
        added_tokens_decoder={},
        get_vocab=dict,
        decode=lambda _: "",
    )
    return Policy(family, build(config, seed=seed), lambda: tokenizer, config, Path(), ModelConfig())


def _fields(module: str, name: str, family: str) -> dict[str, Any]:
    """Return the small values of the fields of a module's dataclass `name`."""
    fields = {field.name for field in dataclasses.fields(getattr(_module(module), name))}
    values = {**_VALUES, **_OWN.get(module, {}), **_OWN.get(family, {})}
    return {field: value for field, value in values.items() if field in fields}


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"mlx_lm.models.{name}")


def _has_model(name: str) -> bool:
    # olmo ends the process where its package is missing.
    with contextlib.suppress(SystemExit):
        return hasattr(_module(name), "Model")
    return True
