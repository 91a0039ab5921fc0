"""A fast decoding step on CUDA for the most common architecture: five kernels per layer.

At the model sizes that train on one GPU, the number of kernels decides how long a step takes, and mlx-lm's layers
take fifteen each. Here queries, keys and values are one product, and so are gate and up. The norms and the rotation
of heads, attention and the cache are one kernel. Each residual sum is part of the product before it. The norm of a
layer's input and the gate are parts of our own products (`products`); weights that these do not support, such as float32
ones, take MLX's products and eight kernels.

Depends on mlx-lm's modules of this architecture, not on how caches or sampling work. The results equal the model's
up to rounding; `step` checks this before it relies on them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu

from grpo_actors.policy.architectures import architecture_of
from grpo_actors.policy.copies import may_copy
from grpo_actors.policy.decoding.products import arranged, fits, gated_rows, product, tiled, untiled
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
        self._heads = Heads(attention.n_heads, attention.n_kv_heads, size, attention.scale, eps)
        self._rope = attention.rope
        self._eps = model.model.norm.eps
        #: Whether the layers' products are our own.
        self._own_products = all(_fits(layer) for layer in model.layers)

    def arrays(self, model: Any) -> Arrays:
        """Return the model's weights, joined where the step needs it; joined weights are copies of the present ones."""
        body = model.model
        head = model.get("lm_head", body.embed_tokens)
        layer_arrays = _own_layer_arrays if self._own_products else _layer_arrays
        return {
            "embedding": body.embed_tokens.weight,
            "layers": [layer_arrays(layer) for layer in model.layers],
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
        rotation = self._rotation(lengths)
        own = self._own_products
        x = tiled(x) if own else x
        for i, layer in enumerate(arrays["layers"]):
            attended = partial(
                attend,
                past=Past(cache, i, lengths),
                heads=self._heads,
                rotation=rotation,
                norms=layer.get("head_norms"),
                tiles=own,
            )
            x = (self._own_layer if own else self._layer)(x, layer, attended)
        x = untiled(x, tokens.size) if own else x
        return _product(self._normed(x, arrays["norm"]), arrays["head"])

    def _own_layer(self, x: mx.array, layer: Arrays, attended: Callable[[mx.array], mx.array]) -> mx.array:
        """Compute a layer of tiled rows [R, H] in five kernels; `attended` maps the joined product to the heads' results."""
        joined = product(x, **layer["queries_keys_values"], norm_eps=self._eps, tiles=False)
        x = product(attended(joined), **layer["out"], plus=x)
        gated = product(x, **layer["gate_up"], norm_eps=self._eps, gated=True)
        return product(gated, **layer["down"], plus=x)

    def _layer(self, x: mx.array, layer: Arrays, attended: Callable[[mx.array], mx.array]) -> mx.array:
        """Compute the same of rows [R, H] in eight kernels."""
        joined = _product(self._normed(x, layer["attention_norm"]), layer["queries_keys_values"])
        x = _product(attended(joined), layer["out"], plus=x)
        gate_up = _product(self._normed(x, layer["mlp_norm"]), layer["gate_up"])
        return _product(swiglu(*mx.split(gate_up, 2, axis=-1)), layer["down"], plus=x)

    def _normed(self, x: mx.array, weight: mx.array) -> mx.array:
        normed: mx.array = mx.fast.rms_norm(x, weight, self._eps)
        return normed

    def _rotation(self, lengths: mx.array) -> mx.array:
        """Return [R, D] float32: cosines and sines of each row's position, computed once for all layers.

        Apply the model's own rotation to a head with ones in its first half and zeros in its second; this works for
        any frequencies and factors.
        """
        rows, size = lengths.size, self._heads.size
        # Repeated row by row: for a broadcast input, MLX 0.32's rotation on CUDA gives every row the last row's position.
        ones_and_zeros = mx.array(np.repeat([[1.0, 0.0]] * rows, size // 2, axis=1), mx.float32)
        turned: mx.array = self._rope(ones_and_zeros.reshape(rows, 1, 1, size), offset=lengths)
        return turned.reshape(rows, size)


def blocks_of(model: Any) -> Blocks | None:
    """Return the model's blocks; None for other architectures, or if the model is too large to copy its layers' weights."""
    if not architecture_of(model).plain_blocks or not all(_is_plain(layer) for layer in model.layers):
        return None
    embedding = model.model.embed_tokens
    head = model.get("lm_head", embedding)
    if type(embedding) is not nn.Embedding or type(head) not in {nn.Embedding, nn.Linear}:
        return None
    if len({array.dtype for _, array in tree_flatten(model.parameters())}) > 1:  # the kernels support one
        return None
    copied = sum(linear.weight.nbytes for layer in model.layers for linear in _linears(layer))
    return Blocks(model) if may_copy(copied, memory_bytes()) else None


def _is_plain(layer: Any) -> bool:
    """Return whether a layer has unpacked weights without adapters, and rotates element i of a head with i + D/2."""
    return not getattr(layer.self_attn.rope, "traditional", False) and all(
        type(linear) is nn.Linear for linear in _linears(layer)
    )


def _linears(layer: Any) -> tuple[nn.Linear, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*heads, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _fits(layer: Any) -> bool:
    """Return whether `products` supports all products of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    size = attention.q_proj.weight.shape[1]
    joined = sum(len(linear.weight) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    shapes = [(joined, size)]
    shapes += [
        (linear.weight.shape[0], linear.weight.shape[1]) for linear in (attention.o_proj, mlp.down_proj)
    ]
    dtype = attention.q_proj.weight.dtype
    gates_fit = fits(2 * len(mlp.up_proj.weight), size, dtype, gated=True)
    return gates_fit and all(fits(*shape, dtype) for shape in shapes)


def _own_layer_arrays(layer: Any) -> Arrays:
    """Return a layer's weights for `products`: the norms' weights are parts of the products after them."""
    attention, mlp = layer.self_attn, layer.mlp
    gate_up = {name: gated_rows(mlp.gate_proj[name], mlp.up_proj[name]) for name in _names(mlp.gate_proj)}
    return _head_norms(attention) | {
        "queries_keys_values": _arranged(
            _joined(attention.q_proj, attention.k_proj, attention.v_proj), layer.input_layernorm
        ),
        "out": _arranged(_joined(attention.o_proj)),
        "gate_up": _arranged(gate_up, layer.post_attention_layernorm),
        "down": _arranged(_joined(mlp.down_proj)),
    }


def _arranged(linear: Arrays, norm: Any = None) -> Arrays:
    weight = linear["weight"]
    if norm is not None:
        scaled = weight.astype(mx.float32) * norm.weight.astype(mx.float32)
        weight = scaled.astype(weight.dtype)
    # Contiguous, or every step would copy it.
    return linear | {"weight": mx.contiguous(arranged(weight))}


def _head_norms(attention: Any) -> Arrays:
    return {"head_norms": (attention.q_norm.weight, attention.k_norm.weight)} if "q_norm" in attention else {}


def _layer_arrays(layer: Any) -> Arrays:
    attention, mlp = layer.self_attn, layer.mlp
    return _head_norms(attention) | {
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
    if len(linears) == 1:
        return {name: linears[0][name] for name in _names(linears[0])}
    return {name: mx.concatenate([linear[name] for linear in linears]) for name in _names(linears[0])}


def _names(linear: Any) -> list[str]:
    return [name for name in ("weight", "bias") if name in linear]


def _product(x: mx.array, linear: Arrays, plus: mx.array | None = None) -> mx.array:
    """Compute X Wᵀ + b + `plus`; without a bias, the product itself adds `plus`."""
    weight = linear["weight"].T
    if "bias" in linear:
        product = mx.addmm(linear["bias"], x, weight)
        return product if plus is None else plus + product
    return x @ weight if plus is None else mx.addmm(plus, x, weight)
