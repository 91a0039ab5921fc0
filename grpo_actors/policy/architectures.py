"""What is known of mlx-lm's models, one row each. A model without a row works too, by the slower, general ways.

To speed up one more, add its row. The tests compare every row with the model's own results.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_actors.errors import ConfigError
from grpo_actors.policy.config_json import text_part


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


#: ``model_type`` of the models that mlx-lm divides among ranks (``shard``) with right gradients. The last are other names.
DIVISIBLE_TO_TRAIN = frozenset(
    {
        *("exaone_moe", "glm4_moe", "gpt_oss", "llama", "minimax_m3_vl", "ministral3", "qwen2", "qwen3"),
        *("qwen3_moe", "solar_open", "step3p5", "iquestcoder", "mistral", "xverse"),
    }
)
#: Those that it divides at all. It leaves out sums in the backward pass of latent attention, which sampling does not need.
#: Not kimi_k3, whose joined projection is cut into three first: an adapter would not know its part.
DIVISIBLE = DIVISIBLE_TO_TRAIN | {
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41", "glm4_moe_lite", "glm_moe_dsa"),
    *(
        "iquestloopcoder",
        "kimi_k25",
        "longcat_flash",
        "longcat_flash_ngram",
        "minimax",
        "mistral4",
        "muse_spark",
    ),
    *("prism_hadamard_qwen35", "qwen3_5", "qwen3_5_moe"),
    *("deepseek_v41_text", "joyai_llm_flash", "kimi_k2", "minimax_m2"),
}


def require_divisible(
    name: str, architecture: Mapping[str, Any], ranks: int, setting: str, *, trains: bool = False
) -> None:
    """Check that a model can be divided among ranks.

    Args:
        name: The model's name for the user.
        architecture: Content of its config.json.
        ranks: Their number.
        setting: What the user calls it.
        trains: Whether an adapter on it is to be trained.

    Raises:
        ConfigError: It cannot.
    """
    if ranks == 1:
        return
    kind = architecture.get("model_type")
    if kind not in DIVISIBLE:
        raise ConfigError(f"{setting}: must be 1 for {name}: mlx-lm cannot divide a {kind}, got {ranks}")
    if trains and kind not in DIVISIBLE_TO_TRAIN:
        raise ConfigError(
            f"{setting}: must be 1 for {name}: the gradients of a {kind} that mlx-lm divides are wrong, got {ranks}"
        )
    text = text_part(architecture)
    for what, key in (("heads", "num_attention_heads"), ("key-value heads", "num_key_value_heads")):
        count = text.get(key)
        if isinstance(count, int) and count % ranks:
            raise ConfigError(f"{setting}: must divide the {count} {what} of {name}, got {ranks}")


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
