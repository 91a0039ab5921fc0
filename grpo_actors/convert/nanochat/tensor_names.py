"""Names and shapes of a checkpoint's tensors, and the content of config.json.

nanochat and mlx-lm use the same tensor names. Tensors that the first published model (2025) does not have are
refused by name (value embeddings, residual lambdas, gates): without them the model would still answer, but it would
be a different model.
"""

import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from grpo_actors.convert.nanochat.source_files import Sizes
from grpo_actors.convert.nanochat.torch_file import TorchFile
from grpo_actors.errors import ModelError

#: Prefix that torch.compile adds to every name.
_COMPILED = "_orig_mod."
#: nanochat pads the rows of the two vocabulary matrices to a multiple of this.
_ROW_MULTIPLE = 64
_VOCABULARY = ("transformer.wte.weight", "lm_head.weight")


def config(sizes: Sizes, dtype: str) -> dict[str, Any]:
    """Return the content of config.json without the token ids, which come from the tokenizer."""
    return {
        "model_type": "nanochat",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 4 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor, in the order of the forward pass."""
    hidden, kv = sizes.hidden, sizes.hidden // sizes.heads * sizes.kv_heads
    layer = {
        "attn.c_q": (hidden, hidden),
        "attn.c_k": (kv, hidden),
        "attn.c_v": (kv, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (4 * hidden, hidden),
        "mlp.c_proj": (hidden, 4 * hidden),
    }
    table = (sizes.vocab, hidden)
    yield _VOCABULARY[0], table
    for index in range(sizes.layers):
        for name, shape in layer.items():
            yield f"transformer.h.{index}.{name}.weight", shape
    yield _VOCABULARY[1], table


def stored_names(file: TorchFile, sizes: Sizes) -> dict[str, str]:
    """Map mlx-lm's name of every tensor to its name in the file.

    Raises:
        ModelError: a tensor is missing, unknown or has another shape.
    """
    names = {name.removeprefix(_COMPILED): name for name in file.tensors}
    known = {}
    # One by one, so that a damaged layer count fails at the first layer that is missing.
    for name, shape in shapes(sizes):
        if name not in names:
            raise ModelError(f"{file.path}: tensor {name} is missing; the file is not a whole model")
        found = file.tensors[names[name]].shape
        if found != shape and not (name in _VOCABULARY and found == _padded(shape)):
            raise ModelError(f"{file.path}: tensor {name} must have shape {shape}, got {found}")
        known[name] = names[name]
    _refuse_unknown(file, sorted(names.keys() - known.keys()))
    return known


def weight(file: TorchFile, name: str, stored: str, sizes: Sizes, dtype: mx.Dtype) -> mx.array:
    """Read the tensor `name` in `dtype`, without the padding rows of a vocabulary matrix.

    Raises:
        ModelError: it is not finite.
    """
    array = file.read(stored)
    if name in _VOCABULARY:
        array = array[: sizes.vocab]
    array = array.astype(dtype)
    if not mx.all(mx.isfinite(array)).item():
        raise ModelError(
            f"{file.path}: tensor {name} is not finite as {str(dtype).removeprefix('mlx.core.')}; take --dtype "
            "bfloat16 or float32, or fetch the file again if the weight is not finite in these either"
        )
    return array


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = shape
    return (-(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE, columns)


def _refuse_unknown(file: TorchFile, unknown: list[str]) -> None:
    if not unknown:
        return
    # One name for all layers: h.0.attn.ve_gate and h.31.attn.ve_gate are the same part.
    parts = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in unknown))
    raise ModelError(
        f"{file.path}: {len(unknown)} tensors are not known to mlx-lm's nanochat ({', '.join(f'{part!r:.60}' for part in parts[:4])}"
        f"{', …' if len(parts) > 4 else ''}); the checkpoint is of a newer nanochat and needs them"
    )
