"""Compute rows that hold several texts: prompts, each followed by its completions (`objective.micro_batches`).

Every token is given to the model as a batch row of its own, with its position as the cache's offset. All that a model
computes token by token (products, norms, the rotation of heads) is then right as it is. Only attention looks at other
tokens: here the rows are put together again, with a mask by which each token sees its own prompt and its own past.

Depends on the cache through which mlx-lm's models read positions and masks, and on the function that they call for
attention; not on what is predicted. Works for models whose layers all keep keys and values of every position (mlx-lm's
plain `KVCache`): see `packs_rows`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from grpo_actors.policy.architectures import architecture_of
from grpo_actors.policy.attention import Callers, keeps_all_positions
from grpo_actors.policy.model import logits_alone, same_logits


class PackedRows:
    """B rows of T tokens, as the cache of every layer: it tells the layer positions and the mask, and keeps nothing."""

    def __init__(self, batch: Mapping[str, mx.array]) -> None:
        """Take `MicroBatch.arrays()`; positions, prompt_of and completion_of are read."""
        self._batch = batch
        #: B and T.
        self.shape = batch["tokens"].shape
        #: Position [B · T] int32 of each token in its own text.
        self.offset = batch["positions"].reshape(-1)
        self._masks: dict[int | None, mx.array] = {}

    def make_mask(
        self,
        tokens: int,
        *,
        return_array: bool = False,  # noqa: ARG002 - the signature is mlx-lm's
        window_size: int | None = None,
    ) -> mx.array:
        """Return which tokens each token of a row sees: [B, 1, T, T] bool."""
        assert tokens == 1
        if window_size not in self._masks:
            self._masks[window_size] = self._mask(window_size)
        return self._masks[window_size]

    def _mask(self, window_size: int | None) -> mx.array:
        prompts, completions, positions = (
            self._batch[name] for name in ("prompt_of", "completion_of", "positions")
        )
        rows = mx.arange(self.shape[1])
        same_completion = completions[:, :, None] == completions[:, None]
        seen = (prompts[:, :, None] == prompts[:, None]) & (same_completion | (completions[:, None] == 0))
        # A prompt comes before its completions, so the past of a token is to its left.
        seen = seen & (rows[:, None] >= rows)
        if window_size is not None:
            seen = seen & (positions[:, None] > positions[:, :, None] - window_size)
        return seen[:, None]

    @staticmethod
    def update_and_fetch(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values [B · T, H, 1, D] unchanged."""
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        """Compute attention within each row; takes and returns arrays [B · T, H, 1, D], as mlx-lm's layers do."""
        rows, tokens = self.shape
        together = (
            x.reshape(rows, tokens, *x.shape[1::2]).transpose(0, 2, 1, 3) for x in (queries, keys, values)
        )
        mixed: mx.array = base.scaled_dot_product_attention(*together, *args, **kwargs)
        return mixed.transpose(0, 2, 1, 3).reshape(*queries.shape[:-1], -1)


def packed_outputs(model: Any, body: Callable[..., mx.array], batch: Mapping[str, mx.array]) -> mx.array:
    """Return the outputs [B · T, …] of a model's body for every token of packed rows.

    Args:
        model: The whole model, for which `packs_rows` was true.
        body: The part of it to run, or all of it; maps ids [N, 1] and a cache to [N, 1, …].
        batch: `MicroBatch.arrays()`.
    """
    rows = PackedRows(batch)
    outputs: mx.array = body(batch["tokens"].reshape(-1, 1), cache=[rows] * len(model.layers))[:, 0]
    return outputs


def may_pack_rows(model: Any) -> bool:
    """Return whether all layers keep keys and values of every position, and prepare them for `packed_outputs`."""
    if not keeps_all_positions(model):
        return False
    Callers(model)  # so that the layers ask their cache for attention
    return True


def packs_rows(model: Any) -> bool:
    """Return whether the model's outputs are the same in packed rows.

    Known blocks give the same; of others a row of two prompts and three completions is tried.
    """
    if not may_pack_rows(model):
        return False
    if architecture_of(model).plain_blocks:
        return True
    # 3 1 2 1 3 2 | 1 2 2, then 2 1 | 3 2 and 2 1 | 1 3 1, then padding.
    batch = {
        "tokens": mx.array([[3, 1, 2, 1, 3, 2, 1, 2, 2, 2, 1, 3, 2, 1, 3, 1]]),
        "positions": mx.array([[*range(9), 0, 1, 2, 3, 2, 3, 4]]),
        "prompt_of": mx.array([[0] * 9 + [1] * 7]),
        "completion_of": mx.array([[0] * 6 + [1] * 3 + [0] * 2 + [2] * 2 + [3] * 3]),
    }
    try:
        packed = packed_outputs(model, model, batch)
        mx.eval(packed)
    except (AttributeError, IndexError, TypeError, ValueError):
        return False  # the model reads other attributes of a cache, or expects its offset to be one number
    texts = {(3, 1, 2, 1, 3, 2, 1, 2, 2): (6, 7, 8), (2, 1, 3, 2): (11, 12), (2, 1, 1, 3, 1): (13, 14, 15)}
    return all(
        same_logits(packed[at], row[len(text) - len(places) + i])
        for row, (text, places) in zip(logits_alone(model, list(texts)), texts.items(), strict=True)
        for i, at in enumerate(places)
    )
