"""A fast decoding step on CUDA for the most common architecture: eight kernels per layer.

At the model sizes that train on one GPU, the number of kernels decides how long a step takes, and mlx-lm's layers
take fifteen each. Here queries, keys and values are one product, and so are gate and up. The norms and the rotation
of heads, attention and the cache are one kernel. Each residual sum is part of the product before it.

Depends on mlx-lm's modules of this architecture, not on how caches or sampling work. The results equal the model's
up to rounding; `step` checks this before it relies on them.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu

from grpo_actors.policy.architectures import architecture_of
from grpo_actors.policy.copies import may_copy
from grpo_actors.policy.decoding.slot_kernels import Heads, Past, attend_joined
from grpo_actors.policy.device import memory_bytes

#: Arrays by name, as `mx.compile` takes them.
Arrays = dict[str, Any]


class Blocks:
    """The computation of one model's step from its arrays; it does not depend on the values of the weights."""

    def __init__(self, model: Any) -> None:
        """Read the sizes of `model`: an architecture with `plain_blocks`, whose layers have plain linear modules only."""
        attention = model.layers[0].self_attn
        size = attention.q_proj.weight.shape[0] // attention.n_heads
        normed = getattr(attention, "q_norm", None)
        eps = normed.eps if normed is not None else 0.0
        #: The division of a product of queries, keys and values.
        self.heads = Heads(attention.n_heads, attention.n_kv_heads, size, attention.scale, eps)
        self._rope = attention.rope
        #: Epsilon of the norms of a row.
        self.eps = model.model.norm.eps

    @staticmethod
    def arrays(model: Any) -> Arrays:
        """Return the model's weights, joined where the step needs it; joined weights are copies of the present ones."""
        body = model.model
        head = model.get("lm_head", body.embed_tokens)
        return {
            "embedding": body.embed_tokens.weight,
            "layers": [_layer_arrays(layer) for layer in model.layers],
            "norm": body.norm.weight,
            "head": _joined(head),
        }

    def logits(
        self,
        arrays: Arrays,
        tokens: mx.array,
        lengths: mx.array,
        cache: mx.array,
        attend: Callable[..., mx.array] = attend_joined,
    ) -> mx.array:
        """Return the logits [R, V] of each row's next token.

        Args:
            arrays: The model's `arrays`.
            tokens: [R], the token that each row is fed.
            lengths: [R] int32, tokens that each row holds; this is the position of the token that it is fed.
            cache: [L, 2, R, Hkv, columns, D]; CHANGES, in column `lengths` of each row.
            attend: `slot_kernels.attend_joined`, or a function that computes the same.
        """
        x = arrays["embedding"][tokens]
        rotation = self.rotation(lengths)
        for i, layer in enumerate(arrays["layers"]):
            joined = _product(self._normed(x, layer["attention_norm"]), layer["queries_keys_values"])
            past = Past(cache, i, lengths)
            mixed = attend(joined, past, self.heads, rotation, layer.get("head_norms"))
            x = _product(mixed, layer["out"], plus=x)
            gate_up = _product(self._normed(x, layer["mlp_norm"]), layer["gate_up"])
            x = _product(swiglu(*mx.split(gate_up, 2, axis=-1)), layer["down"], plus=x)
        return _product(self._normed(x, arrays["norm"]), arrays["head"])

    def _normed(self, x: mx.array, weight: mx.array) -> mx.array:
        normed: mx.array = mx.fast.rms_norm(x, weight, self.eps)
        return normed

    def rotation(self, lengths: mx.array) -> mx.array:
        """Return [R, D] float32: cosines and sines of the positions `lengths` [R], computed once for all layers.

        Apply the model's own rotation to a head with ones in its first half and zeros in its second; this works for
        any frequencies and factors.
        """
        rows, size = lengths.size, self.heads.size
        # Repeated row by row: for a broadcast input, MLX 0.32's rotation on CUDA gives every row the last row's position.
        ones_and_zeros = mx.array(np.repeat([[1.0, 0.0]] * rows, size // 2, axis=1), mx.float32)
        turned: mx.array = self._rope(ones_and_zeros.reshape(rows, 1, 1, size), offset=lengths)
        return turned.reshape(rows, size)


def blocks_of(model: Any) -> Blocks | None:
    """Return the model's blocks; None for other architectures, or if the model is too large to copy its weights."""
    if not architecture_of(model).plain_blocks or not all(_is_plain(layer) for layer in model.layers):
        return None
    embedding = model.model.embed_tokens
    head = model.get("lm_head", embedding)
    if type(embedding) is not nn.Embedding or type(head) not in {nn.Embedding, nn.Linear}:
        return None
    if len({array.dtype for _, array in tree_flatten(model.parameters())}) > 1:  # the kernels support one
        return None
    copied = sum(linear.weight.nbytes for layer in model.layers for linear in _joined_linears(layer))
    return Blocks(model) if may_copy(copied, memory_bytes()) else None


def _is_plain(layer: Any) -> bool:
    """Return whether a layer has unpacked weights without adapters, and rotates element i of a head with i + D/2."""
    rest = (layer.self_attn.o_proj, layer.mlp.down_proj)
    return not getattr(layer.self_attn.rope, "traditional", False) and all(
        type(linear) is nn.Linear for linear in (*_joined_linears(layer), *rest)
    )


def _joined_linears(layer: Any) -> tuple[nn.Linear, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)


def _layer_arrays(layer: Any) -> Arrays:
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = {}
    if "q_norm" in attention:
        head_norms = {"head_norms": (attention.q_norm.weight, attention.k_norm.weight)}
    return head_norms | {
        "attention_norm": layer.input_layernorm.weight,
        "queries_keys_values": _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        "out": _joined(attention.o_proj),
        "mlp_norm": layer.post_attention_layernorm.weight,
        "gate_up": _joined(mlp.gate_proj, mlp.up_proj),
        "down": _joined(mlp.down_proj),
    }


def _joined(*linears: Any) -> Arrays:
    """Join several linear modules into one: weight [out, in], and bias [out] if they have one.

    A single module keeps its own arrays.
    """
    names = [name for name in ("weight", "bias") if name in linears[0]]
    if len(linears) == 1:
        return {name: linears[0][name] for name in names}
    return {name: mx.concatenate([linear[name] for linear in linears]) for name in names}


def _product(x: mx.array, linear: Arrays, plus: mx.array | None = None) -> mx.array:
    """Compute X Wᵀ + b + `plus`; without a bias, the product itself adds `plus`."""
    weight = linear["weight"].T
    if "bias" in linear:
        product = mx.addmm(linear["bias"], x, weight)
        return product if plus is None else plus + product
    return x @ weight if plus is None else mx.addmm(plus, x, weight)
