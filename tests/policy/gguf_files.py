"""Tiny GGUF files made from random mlx-lm models, written with the reference package (gguf)."""

import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2

HEADS, KV_HEADS, LAYERS, INNER = 8, 2, 2, 512
#: Rows of 256, the block of the K-quants.
HIDDEN = 256
HEAD_DIM = HIDDEN // HEADS

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOOL = "<tool>"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ċ Ċ"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte 0..255: printable ones stand for themselves, the rest from U+0100 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


TOKENS = [*CONTROL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES), TOOL]
#: Rows 267..287 have no token: files pad the list with unused ones.
VOCAB = 288
FILLERS = [f"[PAD{row}]" for row in range(len(TOKENS), VOCAB)]


@dataclass
class Tiny:
    """What to write. `formats` overrides the number format by the end of a tensor's name."""

    architecture: str = "llama"
    format: Type = Type.F32
    formats: dict[str, Type] = field(default_factory=dict)
    tied: bool = True
    bias: bool = False
    drop: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)


def source_model(tiny: Tiny) -> Any:
    """A random model with grouped queries and, for qwen2 or `bias`, random biases."""
    sizes = {
        "model_type": tiny.architecture,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "rope_theta": 5000.0,
        "tie_word_embeddings": tiny.tied,
        "max_position_embeddings": 128,
    }
    mx.random.seed(7)
    if tiny.architecture == "llama":
        model = llama.Model(llama.ModelArgs(**sizes, attention_bias=tiny.bias, mlp_bias=tiny.bias))
    else:
        model = qwen2.Model(qwen2.ModelArgs(**sizes))
    # Norms and biases begin as ones and zeros, which would hide a mix-up.
    weights = {name: 0.1 * mx.random.normal(array.shape) for name, array in tree_flatten(model.parameters())}
    weights |= {name: array + 1 for name, array in weights.items() if "norm" in name}
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def pair_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Llama's q and k as GGUF stores them: row 2j of a head is its row j, row 2j + 1 its row d/2 + j."""
    half = len(rows) // heads // 2
    order = [
        head * 2 * half + side * half + j for head in range(heads) for j in range(half) for side in (0, 1)
    ]
    return rows[order]


def stored_name(name: str) -> str:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    _, _, layer, *part = stem.split(".")
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    return f"blk.{layer}.{inner[part[-1]]}.{kind}"


def random_q6_k(shape: tuple[int, ...]) -> np.ndarray:
    """Random Q6_K blocks (the reference package decodes them but cannot make them).

    256 weights in 210 bytes: 192 of bits, 16 signed scales, one float16; weights reach 32 × 3 × 0.001.
    """
    rng = np.random.default_rng(11)
    blocks = int(np.prod(shape)) // 256
    bits = rng.integers(0, 256, (blocks, 192), dtype=np.uint8)
    scales = rng.integers(-3, 4, (blocks, 16)).astype(np.int8).view(np.uint8)
    unit = np.full((blocks, 1), 0.001, np.float16).view(np.uint8)
    return np.concatenate([bits, scales, unit], axis=1).reshape(*shape[:-1], -1)


def encode(rows: np.ndarray, kind: Type) -> np.ndarray:
    if kind == Type.Q6_K:
        return random_q6_k(rows.shape)
    return gguf.quants.quantize(rows, kind)


def write(path: Path, tiny: Tiny) -> Any:
    """Write `tiny` to `path`; returns the source model holding what the quantised weights stand for."""
    model = source_model(tiny)
    writer = gguf.GGUFWriter(path, tiny.architecture)
    write_metadata(writer, tiny)
    stands_for = []
    for name, array in tree_flatten(model.parameters()):
        rows, stored = np.array(array), stored_name(name)
        heads = (
            {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
            if tiny.architecture == "llama"
            else None
        )
        kind = next((kind for end, kind in tiny.formats.items() if stored.endswith(end)), tiny.format)
        kind = Type.F32 if rows.ndim == 1 else kind
        raw = encode(rows, kind)
        stands_for.append((name, mx.array(gguf.quants.dequantize(raw, kind).reshape(rows.shape))))
        if stored not in tiny.drop:
            writer.add_tensor(stored, raw if heads is None else pair_rows(raw, heads), raw_dtype=kind)
    for stored, rows in tiny.extra.items():
        writer.add_tensor(stored, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_weights(stands_for)
    return model


def write_metadata(writer: gguf.GGUFWriter, tiny: Tiny) -> None:
    kinds = [3] * len(CONTROL) + [1] * (256 + len(MERGES)) + [4] + [5] * len(FILLERS)
    architecture = tiny.architecture
    entries = {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm" if architecture == "llama" else "qwen2",
        "tokenizer.ggml.tokens": [*TOKENS, *FILLERS],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    } | tiny.metadata
    for key, value in entries.items():
        if value is not None:
            add_entry(writer, key, value)


def add_entry(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
