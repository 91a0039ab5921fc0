"""Settings that only Gemma 3 has: windows on most layers, two rotary bases, norm weights around one.

The file contains some of them; the rest are constants that GGML associates with the architecture's name.
"""

from typing import Any

from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.sizes import Floats, Sizes
from grpo_actors.errors import ModelError

#: Every sixth layer attends to the whole text, unless the file specifies another interval.
PATTERN = 6
#: Rotary base of the layers with a window.
LOCAL_BASE = 10000.0
#: Only the 27B model divides its queries by √(hidden / heads), not by √(head dimension).
LAYERS_OF_27B = 62


def norm_offset(_sizes: Sizes, rows: Floats) -> Floats:
    """Subtract the 1 that the GGUF writer adds to norm weights; a model folder keeps them around zero."""
    return rows - 1


def settings(gguf: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """Return the part of config.json that only Gemma 3 has.

    Raises:
        ModelError: the file caps its logits, which Gemma 3 does not.
    """
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if gguf.value(f"gemma3.{cap}", float, 0.0):
            raise ModelError(f"{gguf.path}: gemma3 with {cap} is not supported; no config can say it")
    window = gguf.value("gemma3.attention.sliding_window", int, 0)
    # With a pattern of 1, every layer attends to the whole text.
    pattern = gguf.value("gemma3.attention.sliding_window_pattern", int, PATTERN) if window else 1
    wide = sizes.layers == LAYERS_OF_27B
    return {
        "query_pre_attn_scalar": sizes.hidden // sizes.heads if wide else sizes.head_dim,
        "sliding_window": window or gguf.value("gemma3.context_length", int),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": gguf.value("gemma3.rope.freq_base_swa", float, LOCAL_BASE),
    }
