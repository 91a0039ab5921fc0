"""What is known of mlx-lm's models, one row each. A model without a row works too, by the slower, general ways.

To speed up one more, add its row. The tests compare every row with the model's own results.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Architecture:
    """What may be relied on in the models of one module of mlx-lm."""

    #: Logits are exactly head(body(tokens)), with a soft cap at most: no scaling, one head (`logprobs.split_head`).
    plain_head: bool = False
    #: The module's class `MLP` computes down(silu(gate) · up); other models are made of it too (`recomputation`).
    gated_mlp: bool = False
    #: The layers are those that `decoding.blocks` writes out for CUDA.
    plain_blocks: bool = False
    #: Layers find the keys of an earlier layer in its cache, so that a text without a past needs an empty one.
    shares_keys_by_cache: bool = False


_PACKAGE = "mlx_lm.models."
_PLAIN_HEAD = Architecture(plain_head=True)
_PLAIN = Architecture(plain_head=True, gated_mlp=True, plain_blocks=True)

#: Module of mlx-lm -> what is known of it.
ARCHITECTURES = {
    "llama": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3_moe": _PLAIN_HEAD,
    "qwen3_next": _PLAIN_HEAD,
    "qwen3_5": _PLAIN_HEAD,
    "qwen3_5_moe": _PLAIN_HEAD,
    "gemma3_text": _PLAIN_HEAD,
    "gemma4": _PLAIN_HEAD,
    "gemma4_text": _PLAIN_HEAD,
    "gpt_oss": _PLAIN_HEAD,
    "mixtral": _PLAIN_HEAD,
    "olmoe": _PLAIN_HEAD,
    "glm4": _PLAIN_HEAD,
    "deepseek_v3": _PLAIN_HEAD,
    "gemma": _PLAIN_HEAD,
    "gemma2": _PLAIN_HEAD,
    "gemma3": _PLAIN_HEAD,
    "mistral3": _PLAIN_HEAD,
    "ernie4_5": _PLAIN_HEAD,
    "exaone4": _PLAIN_HEAD,
    "glm": _PLAIN_HEAD,
    "hunyuan_v1_dense": _PLAIN_HEAD,
    "internlm3": _PLAIN_HEAD,
    "mimo": _PLAIN_HEAD,
    "phimoe": _PLAIN_HEAD,
    "qwen2_moe": _PLAIN_HEAD,
    "seed_oss": _PLAIN_HEAD,
    "starcoder2": _PLAIN_HEAD,
    "gemma3n": Architecture(shares_keys_by_cache=True),
    "phi3": _PLAIN_HEAD,
    "olmo2": _PLAIN_HEAD,
    "olmo3": _PLAIN_HEAD,
    "smollm3": _PLAIN_HEAD,
    "lfm2": _PLAIN_HEAD,
}

#: Module of mlx-lm -> why its models are refused, where no trial could tell: it would end this process.
REFUSED = {
    "phi3small": "its block-sparse attention adds a mask of the wrong kind, which ends the process (signal 11)",
}


def refusal_of(model: Any) -> str | None:
    """Return why a model of mlx-lm must not be run; None: it may."""
    return REFUSED.get(type(model).__module__.removeprefix(_PACKAGE))


def is_known(model: Any) -> bool:
    """Return whether the tests compare all ways to compute a model's architecture: it has a row with `plain_head`."""
    return architecture_of(model).plain_head


def architecture_of(module: Any) -> Architecture:
    """What is known of a model, or of a part of one, by where its class is defined."""
    name = type(module).__module__
    known = ARCHITECTURES.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) else None
    return known or Architecture()
