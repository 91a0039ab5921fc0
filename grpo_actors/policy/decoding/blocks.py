"""A decoding step of the models that most others are built like, written out for CUDA: eight kernels a layer.

At the sizes that are trained on one GPU a step is as long as it has kernels, and mlx-lm's layers take fifteen each. Here
queries, keys and values are one product, and so are gate and up; the norms and the rotation of heads, their attention and
its cache are one kernel; the sum with what came before is a part of the product before it.

Knows the modules of mlx-lm's models of this kind; refuses to know caches and sampling. What it gives is what the model
gives, but for rounding: `step` tries that out before it relies on it.
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
    """How one model's step is computed from its arrays; `arrays` and `logits` are the same for any weights of it."""

    def __init__(self, model: Any) -> None:
        """`model`: one with `plain_blocks` in `policy.architectures`, with nothing in its layers but plain linear ones."""
        attention = model.layers[0].self_attn
        size = attention.q_proj.weight.shape[0] // attention.n_heads
        normed = getattr(attention, "q_norm", None)
        eps = normed.eps if normed is not None else 0.0
        self._heads = Heads(attention.n_heads, attention.n_kv_heads, size, attention.scale, eps)
        self._rope = attention.rope
        self._eps = model.model.norm.eps

    @staticmethod
    def arrays(model: Any) -> Arrays:
        """The weights of a model, joined where the step wants them so: a copy of those, at this moment."""
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
        """Logits [R, V] of the token after each row's.

        Args:
            arrays: Of the model.
            tokens: [R], what each row is fed.
            lengths: [R] int32, tokens that each row holds, which is the position of the one that it is fed.
            cache: [L, 2, R, Hkv, columns, D]; CHANGES, in column `lengths` of each row.
            attend: `slot_kernels.attend_joined`, or what computes the same.
        """
        x = arrays["embedding"][tokens]
        rotation = self._rotation(lengths)
        for i, layer in enumerate(arrays["layers"]):
            joined = _product(self._normed(x, layer["attention_norm"]), layer["queries_keys_values"])
            past = Past(cache, i, lengths)
            mixed = attend(joined, past, self._heads, rotation, layer.get("head_norms"))
            x = _product(mixed, layer["out"], plus=x)
            gate_up = _product(self._normed(x, layer["mlp_norm"]), layer["gate_up"])
            x = _product(swiglu(*mx.split(gate_up, 2, axis=-1)), layer["down"], plus=x)
        return _product(self._normed(x, arrays["norm"]), arrays["head"])

    def _normed(self, x: mx.array, weight: mx.array) -> mx.array:
        normed: mx.array = mx.fast.rms_norm(x, weight, self._eps)
        return normed

    def _rotation(self, lengths: mx.array) -> mx.array:
        """[R, D] float32: cosines and sines of each row's position, once for all layers.

        They are what the model's own rotation makes of ones in the first half of a head and zeros in the second,
        whatever frequencies and factors it has.
        """
        rows, size = lengths.size, self._heads.size
        # Written out row by row: of a broadcast input MLX 0.32's rotation on CUDA gives every row the last row's position.
        ones_and_zeros = mx.array(np.repeat([[1.0, 0.0]] * rows, size // 2, axis=1), mx.float32)
        turned: mx.array = self._rope(ones_and_zeros.reshape(rows, 1, 1, size), offset=lengths)
        return turned.reshape(rows, size)


def blocks_of(model: Any) -> Blocks | None:
    """The blocks that a model is made of; None: it is made of others, or is too large for a copy of them."""
    if not architecture_of(model).plain_blocks or not all(_is_plain(layer) for layer in model.layers):
        return None
    embedding = model.model.embed_tokens
    head = model.get("lm_head", embedding)
    if type(embedding) is not nn.Embedding or type(head) not in {nn.Embedding, nn.Linear}:
        return None
    if len({array.dtype for _, array in tree_flatten(model.parameters())}) > 1:  # the kernels know one
        return None
    copied = sum(linear.weight.nbytes for layer in model.layers for linear in _joined_linears(layer))
    return Blocks(model) if may_copy(copied, memory_bytes()) else None


def _is_plain(layer: Any) -> bool:
    """Whether a layer has unpacked weights without adapters, and turns element i of a head with i + D/2."""
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
    """Weight [out, in], and bias [out] where there is one, of one product in place of several; of one, its own."""
    names = [name for name in ("weight", "bias") if name in linears[0]]
    if len(linears) == 1:
        return {name: linears[0][name] for name in names}
    return {name: mx.concatenate([linear[name] for linear in linears]) for name in names}


def _product(x: mx.array, linear: Arrays, plus: mx.array | None = None) -> mx.array:
    """X Wᵀ + b, and `plus` added within the product where there is no bias."""
    weight = linear["weight"].T
    if "bias" in linear:
        product = mx.addmm(linear["bias"], x, weight)
        return product if plus is None else plus + product
    return x @ weight if plus is None else mx.addmm(plus, x, weight)
