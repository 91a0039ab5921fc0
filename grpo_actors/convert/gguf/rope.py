"""Rotary positions: the base and the scaling rule, from GGUF metadata to config.json's keys."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.errors import ModelError

#: Tensor with one divisor per angle; only Llama 3.1 and related models have it.
FACTORS = "rope_freqs.weight"
#: Constants of every Llama 3 release, by their names in config.json.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def base(gguf: GgufFile, architecture: str) -> float:
    """Return ``rope_theta``; 10000 is GGML's default if the file contains none."""
    return gguf.value(f"{architecture}.rope.freq_base", float, 10000.0)


def scaling(gguf: GgufFile, architecture: str, head_dim: int) -> dict[str, Any] | None:
    """Return ``rope_scaling`` as transformers and mlx-lm read it, or None for plain rotary positions.

    Raises:
        ModelError: the config cannot express the rule.
    """
    if FACTORS in gguf.tensors:
        return _llama3(gguf, base(gguf, architecture), head_dim)
    kind = gguf.value(f"{architecture}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    factor = gguf.value(f"{architecture}.rope.scaling.factor", float)
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        context = gguf.value(f"{architecture}.rope.scaling.original_context_length", int)
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": context}
    raise ModelError(f"{gguf.path}: rope scaling must be none, linear or yarn, got {kind!r:.60}")


def _llama3(gguf: GgufFile, rope_base: float, head_dim: int) -> dict[str, Any]:
    """Return Llama 3.1's scaling, of which the file contains only the resulting divisors.

    The largest divisor is the factor. The other three constants are the same in every Llama 3 release; the
    divisors are recomputed from them, so that any other rule is rejected.
    """
    stored = gguf.read(FACTORS).ravel()
    factor = float(stored.max())
    expected = llama3_factors(rope_base, head_dim, factor)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ModelError(f"{gguf.path}: {FACTORS} does not follow Llama 3's rule; no config can say it")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def llama3_factors(rope_base: float, head_dim: int, factor: float) -> npt.NDArray[np.float32]:
    """Return Llama 3.1's divisor of each angle: 1 for fast ones, `factor` for slow ones, a mean between them."""
    low, high, context = LLAMA3.values()
    angles = rope_base ** (np.arange(0, head_dim, 2) / head_dim)
    turns = context / (2 * math.pi * angles)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)
