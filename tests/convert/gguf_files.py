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
from mlx_lm.models import gemma3_text, llama, qwen2, qwen3, smollm3

HEADS, KV_HEADS, INNER = 8, 2, 512
#: Rows of 256, the block of the K-quants.
HIDDEN = 256
HEAD_DIM = HIDDEN // HEADS
#: Head dimension of the families that choose it freely: not hidden / heads.
OWN_HEAD_DIM = 64
#: Enough layers to have one after SmolLM3's fourth and Gemma 3's sixth, which differ from the others.
LAYERS = {"llama": 2, "qwen2": 2, "qwen3": 2, "smollm3": 5, "gemma3": 7}
#: Sliding window in tokens: shorter than the tests' texts, so that it masks some of them.
WINDOW = 4
FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "smollm3": smollm3, "gemma3": gemma3_text}
#: Families of which the writer reorders q and k rows, so that rows rotated together are neighbours.
PAIRED = ("llama", "smollm3")

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOOL = "<tool>"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ċ Ċ"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte 0..255: printable ones map to themselves, the rest from U+0100 on."""
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
    """Description of a file to write; `formats` overrides number formats by the end of the tensor's name."""

    architecture: str = "llama"
    format: Type = Type.F32
    formats: dict[str, Type] = field(default_factory=dict)
    tied: bool = True
    bias: bool = False
    drop: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)


def arguments(tiny: Tiny) -> dict[str, Any]:
    """Return the model's arguments, by mlx-lm's names."""
    sizes: dict[str, Any] = {
        "model_type": tiny.architecture,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS[tiny.architecture],
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "rope_theta": 5000.0,
        "max_position_embeddings": 128,
    }
    if tiny.architecture == "gemma3":
        return sizes | {
            "head_dim": OWN_HEAD_DIM,
            "query_pre_attn_scalar": OWN_HEAD_DIM,
            "sliding_window": WINDOW,
            "rope_local_base_freq": 10000.0,
        }
    sizes["tie_word_embeddings"] = tiny.tied
    if tiny.architecture == "llama":
        sizes |= {"attention_bias": tiny.bias, "mlp_bias": tiny.bias}
    return sizes | ({"head_dim": OWN_HEAD_DIM} if tiny.architecture == "qwen3" else {})


def source_model(tiny: Tiny) -> Any:
    """Make a random model with grouped queries and, for qwen2 or `bias`, random biases."""
    mx.random.seed(7)
    family = FAMILIES[tiny.architecture]
    model = family.Model(family.ModelArgs(**arguments(tiny)))
    if tiny.architecture == "gemma3":
        model.sanitize({})  # ties the head in Gemma's own way
    # Norms and biases start as ones and zeros, which would hide a mix-up.
    weights = {name: 0.1 * mx.random.normal(array.shape) for name, array in tree_flatten(model.parameters())}
    if tiny.architecture != "gemma3":  # its norms add the 1 themselves
        weights |= {name: array + 1 for name, array in weights.items() if "norm" in name}
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def pair_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return llama's q or k rows in GGUF's order: row 2j of a head is its row j, row 2j + 1 its row d/2 + j."""
    half = len(rows) // heads // 2
    order = [
        head * 2 * half + side * half + j for head in range(heads) for j in range(half) for side in (0, 1)
    ]
    return rows[order]


def stored_name(name: str, architecture: str = "llama") -> str:
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
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
    }
    if architecture == "gemma3":
        inner |= {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    return f"blk.{layer}.{inner[part[-1]]}.{kind}"


def encode(rows: np.ndarray, kind: Type) -> np.ndarray:
    """Encode `rows` in `kind` if the reference package can; if not, return random bytes that it can read.

    Bytes below 0x3C make every float16 among them finite and below 1.
    """
    try:
        return gguf.quants.quantize(rows, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*rows.shape[:-1], rows.shape[-1] // block * size)
        return np.random.default_rng(11).integers(0, 0x3C, shape, dtype=np.uint8)


def write(path: Path, tiny: Tiny) -> Any:
    """Write `tiny` to `path`; return the source model with the dequantised values of its weights."""
    model = source_model(tiny)
    writer = gguf.GGUFWriter(path, tiny.architecture)
    write_metadata(writer, tiny)
    dequantised = []
    for name, array in tree_flatten(model.parameters()):
        rows, stored = np.array(array), stored_name(name, tiny.architecture)
        heads = (
            {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
            if tiny.architecture in PAIRED
            else None
        )
        if tiny.architecture == "gemma3" and stored.endswith("norm.weight"):
            rows += 1
        kind = next((kind for end, kind in tiny.formats.items() if stored.endswith(end)), tiny.format)
        kind = Type.F32 if rows.ndim == 1 else kind
        raw = encode(rows, kind)
        meant = gguf.quants.dequantize(raw, kind).reshape(rows.shape)
        if tiny.architecture == "gemma3" and stored.endswith("norm.weight"):
            meant = meant - 1
        dequantised.append((name, mx.array(meant)))
        if stored not in tiny.drop:
            writer.add_tensor(stored, raw if heads is None else pair_rows(raw, heads), raw_dtype=kind)
    for stored, rows in tiny.extra.items():
        writer.add_tensor(stored, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_weights(dequantised)
    return model


def write_metadata(writer: gguf.GGUFWriter, tiny: Tiny) -> None:
    kinds = [3] * len(CONTROL) + [1] * (256 + len(MERGES)) + [4] + [5] * len(FILLERS)
    architecture = tiny.architecture
    entries = {
        f"{architecture}.block_count": LAYERS[architecture],
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": {"llama": "smollm", "smollm3": "smaug-bpe"}.get(architecture, "qwen2"),
        "tokenizer.ggml.tokens": [*TOKENS, *FILLERS],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    if architecture in ("qwen3", "gemma3"):
        entries |= {f"{architecture}.attention.{part}_length": OWN_HEAD_DIM for part in ("key", "value")}
    if architecture == "gemma3":
        entries[f"{architecture}.attention.sliding_window"] = WINDOW
    entries |= tiny.metadata
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
