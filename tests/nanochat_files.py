"""Write tiny nanochat checkpoints, all three files, without torch; tiktoken itself pickles the tokenizer."""

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

LAYERS, HEADS, KV_HEADS, HIDDEN, CONTEXT = 2, 4, 2, 32, 256

#: nanochat's own pattern, with digits in pairs.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
#: In the order of their merges. "ab" and "bc" compete for "abc", and "23" wins where the split allows it.
MERGED = (
    *("th", "he", "the", " the", " t", "in", "ing", "er", "ab", "bc", "abc", "aa", "aaaa"),
    *(
        "23",
        "12",
        "20",
        "  ",
        "    ",
        "\n\n",
        "wh",
        "wha",
        "what",
        "What",
        "is",
        " is",
        "é",
        b"\xe3\x81",
        "あ",
    ),
)


def encoding(pattern: str = PATTERN, special: tuple[str, ...] = SPECIAL) -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in MERGED:
        ranks[token if isinstance(token, bytes) else token.encode()] = len(ranks)
    ids = {text: len(ranks) + index for index, text in enumerate(special)}
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)


VOCAB = 256 + len(MERGED) + len(SPECIAL)


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 weights by nanochat's names: no matrix is zero, and the soft cap changes the largest logits."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "attn.c_q": (HIDDEN, HIDDEN),
        "attn.c_k": (kv, HIDDEN),
        "attn.c_v": (kv, HIDDEN),
        "attn.c_proj": (HIDDEN, HIDDEN),
        "mlp.c_fc": (4 * HIDDEN, HIDDEN),
        "mlp.c_proj": (HIDDEN, 4 * HIDDEN),
    }
    weights = {"transformer.wte.weight": rng.normal(size=(VOCAB, HIDDEN))}
    for index in range(LAYERS):
        for name, shape in layer.items():
            weights[f"transformer.h.{index}.{name}.weight"] = rng.normal(size=shape) / shape[1] ** 0.5
    weights["lm_head.weight"] = rng.normal(size=(VOCAB, HIDDEN)) * 0.8
    return {name: array.astype(np.float32) for name, array in weights.items()}


@dataclass
class Tiny:
    """The content of a checkpoint. `kinds` maps a tensor's name to torch's storage class; the default is float32."""

    weights: dict[str, np.ndarray] = field(default_factory=random_weights)
    kinds: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    step: int = 650
    tokenizer: bytes = field(default_factory=lambda: pickle.dumps(encoding()))


def write(folder: Path, tiny: Tiny) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_torch(folder / f"model_{tiny.step:06d}.pt", tiny.weights, tiny.kinds)
    sizes = {
        "sequence_len": CONTEXT,
        "vocab_size": VOCAB,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_kv_head": KV_HEADS,
        "n_embd": HIDDEN,
    }
    meta = {"step": tiny.step, "model_config": sizes | tiny.meta}
    (folder / f"meta_{tiny.step:06d}.json").write_text(json.dumps(meta))
    (folder / "tokenizer.pkl").write_bytes(tiny.tokenizer)
    return folder


# --- the bytes of torch.save --------------------------------------------------------------------------


def write_torch(path: Path, weights: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> None:
    """Write a state dictionary: an OrderedDict with the versions of the modules as an attribute."""
    names = list(weights)
    items = b"".join(
        text(name) + tensor(str(key), kinds.get(name, "FloatStorage"), weights[name].shape)
        for key, name in enumerate(names)
    )
    ordered = name_of("collections", "OrderedDict") + b")R"
    metadata = (
        b"}"
        + text("_metadata")
        + ordered
        + b"("
        + text("")
        + b"}"
        + text("version")
        + integer(1)
        + b"su"
        + b"s"
    )
    write_archive(
        path,
        b"\x80\x02" + ordered + b"(" + items + b"u" + metadata + b"b.",
        {str(key): stored(weights[name], kinds.get(name, "FloatStorage")) for key, name in enumerate(names)},
    )


def write_archive(
    path: Path, data: bytes, storages: Mapping[str, bytes], byteorder: bytes = b"little"
) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", data)
        archive.writestr(f"{path.stem}/byteorder", byteorder)
        for key, content in storages.items():
            archive.writestr(f"{path.stem}/data/{key}", content)
        archive.writestr(f"{path.stem}/version", b"3\n")


def tensor(
    key: str,
    kind: str,
    shape: tuple[int, ...],
    *,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    length: int | None = None,
) -> bytes:
    """Return the opcodes of one tensor; its storage has `length` numbers, by default as many as the tensor."""
    if length is None:
        length = int(np.prod(shape))
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    storage = (
        tuple_of(text("storage"), name_of("torch", kind), text(key), text("cuda:0"), integer(length)) + b"Q"
    )
    hooks = name_of("collections", "OrderedDict") + b")R"
    sizes = (tuple_of(*map(integer, shape)), tuple_of(*map(integer, strides)))
    arguments = tuple_of(storage, integer(offset), *sizes, b"\x89", hooks)
    return name_of("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def stored(array: np.ndarray, kind: str) -> bytes:
    if kind == "BFloat16Storage":  # the upper half of float32
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype("<f2" if kind == "HalfStorage" else "<f4").tobytes()


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"
