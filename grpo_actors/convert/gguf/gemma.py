"""What sets Gemma 3 apart: windows on most layers, two rotary bases, norms around one.

The file names some of it; the rest are constants of the architecture that GGML knows by its name.
"""

from typing import Any

from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.sizes import Floats, Sizes
from grpo_actors.errors import ModelError

#: Every sixth layer sees the whole text, where the file does not say otherwise.
PATTERN = 6
#: The rotary base of the layers with a window.
LOCAL_BASE = 10000.0
#: The 27B model alone divides its queries by √(hidden / heads), not by √(head dimension).
LAYERS_OF_27B = 62


def norm_offset(_sizes: Sizes, rows: Floats) -> Floats:
    """Undo the one that the GGUF writer adds to each norm's weights, which a model folder keeps around zero."""
    return rows - 1


def settings(gguf: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """The part of config.json that only Gemma 3 has.

    Raises:
        ModelError: the file caps its logits, which Gemma 3 does not.
    """
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if gguf.value(f"gemma3.{cap}", float, 0.0):
            raise ModelError(f"{gguf.path}: gemma3 with {cap} is not supported; no config can say it")
    window = gguf.value("gemma3.attention.sliding_window", int, 0)
    # A pattern of one: every layer sees the whole text.
    pattern = gguf.value("gemma3.attention.sliding_window_pattern", int, PATTERN) if window else 1
    wide = sizes.layers == LAYERS_OF_27B
    return {
        "query_pre_attn_scalar": sizes.hidden // sizes.heads if wide else sizes.head_dim,
        "sliding_window": window or gguf.value("gemma3.context_length", int),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": gguf.value("gemma3.rope.freq_base_swa", float, LOCAL_BASE),
    }
