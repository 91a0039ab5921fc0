"""Measure what fusing loses: the log-probs of one fixed text under the base, the trained policy and the written folder.

All three compute in float32, independent of the type their weights are stored in, so that only the weights differ.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from grpo_actors.config import ModelConfig
from grpo_actors.convert.fidelity import MEMORY_SHARE, TEXT, text_logprobs
from grpo_actors.policy.device import memory_bytes
from grpo_actors.policy.model import AS_STORED, load_base
from grpo_actors.policy.quantization import is_quantized

#: Largest share of what was learned that may be lost without advice.
LOST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Mean absolute differences of log-probs, in nats a token."""

    #: Between the trained policy and its base.
    learned: float
    #: Between the written folder and the trained policy.
    lost: float
    #: Whether the folder's weights are quantised.
    is_packed: bool

    @property
    def is_poor(self) -> bool:
        """Whether the folder lacks much of what was learned."""
        return self.lost > LOST_SHARE * self.learned


def measure(checkpoint: Path, config: ModelConfig, folder: Path) -> Fidelity | None:
    """Compare the model in `folder` with the adapter in `checkpoint` on its base.

    Args:
        checkpoint: A checkpoint with an adapter.
        config: Section [model] of its run.
        folder: The folder with the fused model.

    Returns:
        The differences; None if base and written model in float32 do not fit into this machine's memory.
    """
    written, _ = mlx_lm.utils.load_model(folder, lazy=True, trust_remote_code=config.trust_remote_code)
    policy = load_base(config, dtype=AS_STORED)
    if max(map(_float32_bytes, (written, policy.model))) > MEMORY_SHARE * memory_bytes():
        return None
    tokens = policy.tokenizer.encode(TEXT)
    packed = is_quantized(written)
    base = text_logprobs(policy.model, tokens)
    trained = text_logprobs(load_adapters(policy.model, str(checkpoint)), tokens)
    del policy  # before the written model's weights are read
    fused = text_logprobs(written, tokens)
    return Fidelity(learned=_distance(trained, base), lost=_distance(fused, trained), is_packed=packed)


def _distance(one: mx.array, other: mx.array) -> float:
    distance: Any = mx.abs(one - other).mean().item()
    return float(distance)


def _float32_bytes(model: nn.Module) -> int:
    """Return the bytes of a model whose floats are float32; packed weights stay packed."""
    arrays = [array for _, array in tree_flatten(model.parameters())]
    return sum(
        array.size * mx.float32.size if mx.issubdtype(array.dtype, mx.floating) else array.nbytes
        for array in arrays
    )
