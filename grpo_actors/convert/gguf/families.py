"""Table of the supported GGUF architectures, with the name of each tensor in a model folder.

To add a family, add a `Family` with its extra layer tensors and the inverse of the changes that the GGUF
writer makes to the weights (`undo`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from grpo_actors.convert.gguf import gemma
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.sizes import Floats, Sizes


class Place(NamedTuple):
    """Destination of a tensor: its name in the folder and its axes, outputs first."""

    name: str
    axes: tuple[str, ...]


def split_rotary_halves(rows: Floats, heads: int) -> Floats:
    """Restore a model folder's order of llama's q and k rows.

    One rotary angle rotates two rows. GGUF stores them next to each other (0, d/2, 1, d/2 + 1, …); a model
    folder keeps them half a head apart (0, 1, …, d/2, …).

    Args:
        rows: (heads × head_dim, …), a weight or a bias.
        heads: query heads for q, key-value heads for k.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


@dataclass(frozen=True)
class Family:
    """One architecture: its layer tensors beyond the common ones, and its own config settings."""

    model_type: str
    hf_class: str
    required: Mapping[str, Place] = field(default_factory=dict)
    #: Config flag -> the layer tensors that exist exactly when it is true.
    optional: Mapping[str, Mapping[str, Place]] = field(default_factory=dict)
    #: Stored name -> function that reverses the GGUF writer's change.
    undo: Mapping[str, Callable[[Sizes, Floats], Floats]] = field(default_factory=dict)
    #: Whether mlx-lm and transformers read head_dim from the config; if not, it is hidden / heads.
    has_head_dim: bool = False
    #: Config key and name of the MLP's activation.
    activation: Mapping[str, str] = field(default_factory=lambda: {"hidden_act": "silu"})
    #: Further settings in config.json that only this family has.
    settings: Callable[[GgufFile, Sizes], dict[str, Any]] = lambda _gguf, _sizes: {}


OUTER = {
    "token_embd.weight": Place("model.embed_tokens.weight", ("vocab", "hidden")),
    "output_norm.weight": Place("model.norm.weight", ("hidden",)),
}
HEAD = {"output.weight": Place("lm_head.weight", ("vocab", "hidden"))}
LAYER = {
    "attn_norm.weight": Place("input_layernorm.weight", ("hidden",)),
    "attn_q.weight": Place("self_attn.q_proj.weight", ("query", "hidden")),
    "attn_k.weight": Place("self_attn.k_proj.weight", ("key", "hidden")),
    "attn_v.weight": Place("self_attn.v_proj.weight", ("key", "hidden")),
    "attn_output.weight": Place("self_attn.o_proj.weight", ("hidden", "query")),
    "ffn_norm.weight": Place("post_attention_layernorm.weight", ("hidden",)),
    "ffn_gate.weight": Place("mlp.gate_proj.weight", ("inner", "hidden")),
    "ffn_up.weight": Place("mlp.up_proj.weight", ("inner", "hidden")),
    "ffn_down.weight": Place("mlp.down_proj.weight", ("hidden", "inner")),
}
QKV_BIAS = {
    "attn_q.bias": Place("self_attn.q_proj.bias", ("query",)),
    "attn_k.bias": Place("self_attn.k_proj.bias", ("key",)),
    "attn_v.bias": Place("self_attn.v_proj.bias", ("key",)),
}
QK_NORM = {
    "attn_q_norm.weight": Place("self_attn.q_norm.weight", ("head",)),
    "attn_k_norm.weight": Place("self_attn.k_norm.weight", ("head",)),
}
OUTPUT_BIAS = {"attn_output.bias": Place("self_attn.o_proj.bias", ("hidden",))}
MLP_BIAS = {
    "ffn_gate.bias": Place("mlp.gate_proj.bias", ("inner",)),
    "ffn_up.bias": Place("mlp.up_proj.bias", ("inner",)),
    "ffn_down.bias": Place("mlp.down_proj.bias", ("hidden",)),
}


def _query_rows(sizes: Sizes, rows: Floats) -> Floats:
    return split_rotary_halves(rows, sizes.heads)


def _key_rows(sizes: Sizes, rows: Floats) -> Floats:
    return split_rotary_halves(rows, sizes.kv_heads)


ROTARY_ROWS = {
    "attn_q.weight": _query_rows,
    "attn_q.bias": _query_rows,
    "attn_k.weight": _key_rows,
    "attn_k.bias": _key_rows,
}
GEMMA_NORMS = {
    "post_attention_norm.weight": Place("post_attention_layernorm.weight", ("hidden",)),
    "ffn_norm.weight": Place("pre_feedforward_layernorm.weight", ("hidden",)),
    "post_ffw_norm.weight": Place("post_feedforward_layernorm.weight", ("hidden",)),
}

FAMILIES = {
    "llama": Family(
        model_type="llama",
        hf_class="LlamaForCausalLM",
        optional={"attention_bias": QKV_BIAS | OUTPUT_BIAS, "mlp_bias": MLP_BIAS},
        undo=ROTARY_ROWS,
        has_head_dim=True,
    ),
    # Llama, but every fourth layer has no rotary positions; only the architecture's name indicates this.
    "smollm3": Family(
        model_type="smollm3",
        hf_class="SmolLM3ForCausalLM",
        undo=ROTARY_ROWS,
        settings=lambda _gguf, _sizes: {"no_rope_layer_interval": 4},
    ),
    "qwen2": Family(model_type="qwen2", hf_class="Qwen2ForCausalLM", required=QKV_BIAS),
    "qwen3": Family(
        model_type="qwen3",
        hf_class="Qwen3ForCausalLM",
        required=QK_NORM,
        has_head_dim=True,
    ),
    "gemma3": Family(
        model_type="gemma3_text",
        hf_class="Gemma3ForCausalLM",
        required=QK_NORM | GEMMA_NORMS,
        undo=dict.fromkeys(
            ("output_norm.weight", "attn_norm.weight", *QK_NORM, *GEMMA_NORMS), gemma.norm_offset
        ),
        has_head_dim=True,
        activation={"hidden_activation": "gelu_pytorch_tanh"},
        settings=gemma.settings,
    ),
}
