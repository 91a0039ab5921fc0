"""Compare a written folder with its source by the log-probs of one fixed text.

Both models compute in float32, independent of the type their weights are stored in, so that only the weights can
differ: equal weights give exactly 0, differently rounded weights a small number.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from grpo_actors.convert.huggingface import load_lazily, load_tokenizer
from grpo_actors.errors import ModelError
from grpo_actors.policy.device import memory_bytes
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.plan import Plan
from grpo_actors.policy.quantization import parameter_count
from grpo_actors.policy.tokenizer import PROBE

#: Prose, arithmetic and code, then text that is hard for tokenizers.
TEXT = (
    "The river rises in the hills north of the town and reaches the sea after ninety miles. In spring, when the "
    "snow melts, it carries so much water that the lower meadows stand under it for weeks.\n\n"
    "Question: A train leaves at 9:15 and arrives at 11:45. How long does it take?\n"
    "Answer: From 9:15 to 11:15 are 2 hours, and 30 minutes more make 2.5 hours, which is 150 minutes.\n\n"
    "def mean(values):\n    return sum(values) / len(values)\n\n"
) + PROBE
#: Largest share of the memory for one model in float32; its activations need the rest.
MEMORY_SHARE = 0.75
#: Largest mean difference of log-probs, in nats, at which two models count as having the same weights.
SAME = 1e-3


def logprob_difference(source: Callable[[], nn.Module], folder: Path, plan: Plan) -> float | None:
    """Return the mean absolute difference between the text's log-probs under a source and under its copy.

    Args:
        source: Loads the source's model; not called if it would not fit into memory.
        folder: The folder that was written; its tokenizer reads the text.
        plan: How it was written.

    Returns:
        Nats a token; None if the source's weights in float32 do not fit into this machine's memory.

    Raises:
        ModelError: the difference is not finite, or is larger than `SAME` though the weights should be the same.
    """
    written, _ = load_lazily(folder, plan)
    # Counts the written model, whose weights are not read yet: loading a source may read all of it at once.
    if parameter_count(written) * mx.float32.size > MEMORY_SHARE * memory_bytes():
        return None
    tokens = load_tokenizer(folder, plan).encode(TEXT)
    before = text_logprobs(source(), tokens)  # frees the source before the written model's weights are read
    after = text_logprobs(written, tokens)
    difference: Any = mx.abs(before - after).mean().item()
    if not math.isfinite(difference) or (plan.keeps_weights and difference > SAME):
        raise ModelError(
            f"{folder}: its log-probs differ from the source's by {difference:.2g} nats a token on the mean; "
            "one of the two was not read as it is meant, and the folder was not kept"
        )
    return float(difference)


def text_logprobs(model: nn.Module, tokens: list[int]) -> mx.array:
    """Cast the model to float32 and return the log-probs of all tokens but the first, [T - 1]."""
    model.set_dtype(mx.float32)
    targets = mx.array([tokens[1:]], dtype=mx.int32)
    logprobs, _ = completion_logprobs(
        model, mx.array([tokens], dtype=mx.int32), mx.array([0], dtype=mx.int32), targets, 1.0
    )
    mx.eval(logprobs)
    return logprobs[0]
