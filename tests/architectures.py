"""Small random models of other architectures, with a vocabulary of 64 tokens and no text."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from grpo_actors.config import ModelConfig
from grpo_actors.policy.model import Policy

VOCABULARY = 64
STOP = 63

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_OWN: dict[str, dict[str, Any]] = {
    # Every second layer sees 8 tokens back, fewer than a prompt has.
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 512},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "norm_eps": 1e-5},
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": 4,
        "chunk_size": 16,
        "layer_norm_epsilon": 1e-5,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 4,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5": {"use_bias": False},
    "exaone4": {"rope_scaling": None, "sliding_window": 8, "sliding_window_pattern": "LG"},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "glm4": {"attention_bias": False, "partial_rotary_factor": 0.5},
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


# Without the embeddings per layer, and with a window of 8 tokens in the first layer of two.
_GEMMA4 = {
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "final_logit_softcapping": 2.0,
}
_OWN["gemma3"] = {"text_config": {"model_type": "gemma3_text", **_COMMON, **_OWN["gemma3_text"]}}
_OWN["mistral3"] = {"text_config": {"model_type": "llama", **_COMMON}}
_OWN["gemma4_text"] = _GEMMA4
_OWN["gemma4"] = {"text_config": {**_COMMON, **_GEMMA4}}
_OWN["qwen3_5"] = {name: value for name, value in _OWN["qwen3_next"].items() if "expert" not in name}
_OWN["qwen3_5_moe"] = _OWN["qwen3_next"]


def config_json(family: str, **changes: Any) -> dict[str, Any]:
    """Return the content of config.json of mlx-lm's module `family`."""
    return {"model_type": family, **_COMMON, **_OWN.get(family, {}), **changes}


def random_policy(family: str, *, seed: int = 0, **changes: Any) -> Policy:
    """Build a policy of mlx-lm's module `family` with random weights; only `STOP` ends a completion."""
    config = config_json(family, **changes)
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    sanitize = getattr(model, "sanitize", None)
    if (
        sanitize is not None and "text_config" not in config
    ):  # here gemma3 detects that its embeddings are tied
        sanitize({} if config["tie_word_embeddings"] else dict(tree_flatten(model.parameters())))
    # The initial weights give almost uniform logits; larger ones give a distribution with a shape.
    model.update(
        tree_map_with_path(
            lambda name, w: 3 * w if name.endswith("weight") and w.ndim == 2 else w, model.parameters()
        )
    )
    model.eval()
    mx.eval(model.parameters())
    tokenizer = SimpleNamespace(eos_token_ids={STOP}, get_vocab=dict, decode=lambda _: "")
    return Policy(family, model, lambda: tokenizer, config, Path(), ModelConfig())
