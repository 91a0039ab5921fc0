"""Bound the memory of the processes that sample: the KV cache of a batch, a prefill, and the logits of a step."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_actors.config import Config
from grpo_actors.policy.copies import may_copy
from grpo_actors.policy.prefill import PREFILL_TOKENS
from grpo_actors.supervisor.model_files import Tensor, Widths

#: Projections that one joined matrix product can replace (`policy.decoding.blocks`).
_JOINED = re.compile(r"\b(q|k|v|gate|up)_proj\.weight$")
#: Matrices that every model divides among ranks; some divide more.
_DIVIDED = re.compile(r"\blayers\..*\b(q|k|v|o|gate|up|down)_proj\.weight$")
#: Columns of the cache are allocated in multiples of this number.
_COLUMN_MULTIPLE = 256
#: Fewest numbers of a quantised key or value that share a scale and an offset; layers that are unpacked at the same time.
_KV_GROUP, _UNPACKED = 32, 2
#: Arrays of a prompt's token that a layer computes, of the width of the residual stream and of the MLP.
_HIDDEN_ARRAYS, _MLP_ARRAYS = 8, 3
#: float32 arrays of the vocabulary's width for each row that a draw computes.
_DRAWN = 5


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest batch of completions that a process decodes."""

    rows: int
    prompts: int
    prompt_tokens: int
    new_tokens: int

    @property
    def columns(self) -> int:
        """Columns of the cache: the tokens that a row may hold, rounded up."""
        tokens = self.prompt_tokens + self.new_tokens
        return -(-tokens // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def worker_batch(config: Config) -> Batch:
    """Return the largest batch of a rollout worker."""
    rollout, prompt = config.rollout, config.data.max_prompt_length
    rows = rollout.batch_groups * rollout.num_generations
    if rollout.max_kv_tokens:
        rows = min(rows, max(1, rollout.max_kv_tokens // (prompt + rollout.max_new_tokens)))
    return Batch(rows, min(rows, rollout.batch_groups), prompt, rollout.max_new_tokens)


def evaluator_batch(config: Config) -> Batch:
    """Return the largest batch of the evaluator, which samples one answer of each problem."""
    settings = config.evaluator
    rows = min(settings.eval_batch_size, settings.eval_subset_size or settings.eval_batch_size)
    new_tokens = settings.eval_max_new_tokens or config.rollout.max_new_tokens
    return Batch(rows, rows, config.data.max_prompt_length, new_tokens)


def cache_bytes(widths: Widths, batch: Batch, width: int, kv_bits: int = 0) -> float:
    """Return the bytes of all rows' keys and values, and of the prompts' before they are copied to the rows.

    With `kv_bits`, the rows' are packed, except those of the layers that the device is working on.
    """
    computed = kept = float(widths.layers * width)
    if kv_bits:
        kept = widths.layers * (kv_bits / 8 + 2 * width / _KV_GROUP) + _UNPACKED * width
    return widths.keys_values * (
        batch.rows * batch.columns * kept + batch.prompts * batch.prompt_tokens * computed
    )


def step_bytes(widths: Widths, batch: Batch, width: int) -> float:
    """Return the bytes of the activations of a prefill or the logits of a step, whichever is more."""
    prompt = min(PREFILL_TOKENS, batch.prompts * batch.prompt_tokens)
    tokens = max(prompt, batch.prompt_tokens)  # a longer prompt runs alone
    arrays = _HIDDEN_ARRAYS * widths.hidden + _MLP_ARRAYS * widths.intermediate
    # A device is sent all layers before it has computed the first.
    prefill = tokens * arrays * width * widths.layers
    logits = batch.rows * widths.vocabulary * (width + 4 * _DRAWN)
    return max(prefill, logits)


def divided_bytes(tensors: Sequence[Tensor], width: int, bits: int, ranks: int = 1) -> float:
    """Return the bytes of the weights in each of the ranks among which the model is divided; else as `Tensor.bytes`."""
    return sum(
        tensor.bytes(width, bits) / (ranks if _DIVIDED.search(tensor.name) else 1) for tensor in tensors
    )


def joined_bytes(tensors: Sequence[Tensor], width: int, device_bytes: float | None) -> float:
    """Return the bytes of the weights that are copied for sampling on CUDA; 0 if they are quantised or too large."""
    if any(tensor.bits for tensor in tensors):
        return 0.0
    size = sum(tensor.bytes(width, 0) for tensor in tensors if _JOINED.search(tensor.name))
    return size if device_bytes is None or may_copy(size, device_bytes) else 0.0
