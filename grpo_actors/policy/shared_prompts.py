"""Compute each prompt once for all of its completions, with gradients.

There are two passes. The first runs the prompts alone; each layer keeps their keys and values. The second runs the
completions; each token attends to its own prompt and to its own past. The gradients of all completions of a prompt
flow back into the first pass through its keys and values. Dropout draws once per prompt, so a prompt's completions
all see the same draw.

Depends on the cache through which mlx-lm's models read positions and masks, not on what is predicted. Works for
models whose layers all keep keys and values of every position (mlx-lm's plain `KVCache`): see `shares_prompts`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, create_attention_mask, make_prompt_cache

from grpo_actors.policy.model import same_logits

#: Position of padding: it lies after every token, so no token attends to it.
_NEVER = 2**31 - 1


class Layer:
    """The cache of one layer: keys and values [P, H, L, D] of the prompts.

    They carry a gradient: code that recomputes a layer must pass `inputs` in as arguments and return `outputs`.
    """

    def __init__(self, inputs: list[mx.array]) -> None:
        #: Keys and values that the layer reads; empty in the first pass.
        self.inputs = inputs
        #: Keys and values that the layer leaves behind; empty in the second pass.
        self.outputs: list[mx.array] = []


class PromptLayer(Layer):
    """The cache of one layer in the first pass: keeps the keys and values that the layer computes."""

    offset = 0

    def make_mask(self, tokens: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return a causal mask. It covers padding too: prompts are padded on the right, where no token attends."""
        return create_attention_mask(tokens, 0, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep and return keys and values [P, H, L, D]."""
        self.outputs = [keys, values]
        return keys, values


class CompletionLayer(Layer):
    """The cache of one layer in the second pass: puts each row's prompt before its own tokens."""

    def __init__(self, inputs: list[mx.array], rows: "Rows") -> None:
        super().__init__(inputs)
        self._rows = rows

    @property
    def offset(self) -> mx.array:
        """Position [N] int32 of each row's first token."""
        return self._rows.offsets

    def make_mask(
        self,
        tokens: int,
        *,
        return_array: bool = False,  # noqa: ARG002 - the signature is mlx-lm's
        window_size: int | None = None,
    ) -> mx.array:
        """Return the mask [N, 1, C, L + C] bool."""
        return self._rows.mask(tokens, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the rows' own keys and values [N, H, C, D] after their prompts': [N, H, L + C, D]."""
        prompt_keys, prompt_values = self.inputs
        return self._rows.after_prompts(prompt_keys, keys), self._rows.after_prompts(prompt_values, values)


class Rows:
    """The assignment of completions (rows) to prompts."""

    def __init__(self, prompt_of: mx.array, prompt_lengths: mx.array, prompt_keys: mx.array) -> None:
        """Take prompt_of [N], prompt_lengths [P], and any layer's keys [P, H, L, D], for their width and type."""
        self.offsets = prompt_lengths[prompt_of]
        # [N, P]. Cast once, here: MLX 0.32 fails to compile a cast in every recomputed block.
        self._one_hot = (prompt_of[:, None] == mx.arange(len(prompt_keys))).astype(prompt_keys.dtype)
        columns = mx.arange(prompt_keys.shape[2])
        self._prompt_positions = mx.where(columns < self.offsets[:, None], columns, _NEVER)

    def mask(self, tokens: int, window_size: int | None) -> mx.array:
        """Return which keys each token of a row sees, by their positions in the row's text."""
        own = self.offsets[:, None] + mx.arange(tokens)
        keys = mx.concatenate([self._prompt_positions, own], axis=1)[:, None]
        seen = keys <= own[:, :, None]
        if window_size is not None:
            seen = seen & (keys > own[:, :, None] - window_size)
        return seen[:, None]

    def after_prompts(self, prompts: mx.array, own: mx.array) -> mx.array:
        """Join prompts [P, H, L, D] and the rows' own [N, H, C, D] to [N, H, L + C, D].

        Select each row's prompt by a product with a one-hot matrix. The product is exact, and its gradient is a
        product too. The gradient of an index adds up element by element (17 times slower on a CPU, and less
        precise in bfloat16).
        """
        chosen = self._one_hot @ prompts.reshape(len(prompts), -1)
        return mx.concatenate([chosen.reshape(-1, *prompts.shape[1:]), own], axis=2)


def completion_outputs(
    model: Callable[..., mx.array], batch: Mapping[str, mx.array], layers: int
) -> mx.array:
    """Return the outputs [N, C, …] of `model` (or of its body) for `inputs`, each row after its prompt.

    Args:
        model: Maps ids [.., T] and a cache to [.., T, …].
        batch: `MicroBatch.arrays()`; prompts, prompt_lengths, prompt_of and inputs are read.
        layers: Number of the model's layers.
    """
    first = [PromptLayer([]) for _ in range(layers)]
    model(batch["prompts"], cache=first)
    rows = Rows(batch["prompt_of"], batch["prompt_lengths"], first[0].outputs[0])
    return model(batch["inputs"], cache=[CompletionLayer(layer.outputs, rows) for layer in first])


def unshared_rows(batch: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
    """Return each completion after its own copy of its prompt.

    Returns:
        Tokens [N, L + C], and the index [N] of each row's last prompt token.
    """
    prompts, inputs, prompt_of = batch["prompts"], batch["inputs"], batch["prompt_of"]
    start = batch["prompt_lengths"][prompt_of]
    both = mx.concatenate([prompts[prompt_of], inputs], axis=1)
    columns, last = mx.arange(both.shape[1]), both.shape[1] - 1
    gap = prompts.shape[1] - start[:, None]
    indices = mx.where(columns < start[:, None], columns, mx.minimum(columns + gap, last))
    return mx.take_along_axis(both, indices, axis=1), start


def shares_prompts(model: Any) -> bool:
    """Return whether the model's outputs are the same with shared prompts: tries two prompts of different lengths."""
    if not all(type(layer) is KVCache for layer in make_prompt_cache(model)):
        return False
    batch = {
        "prompts": mx.array([[3, 1, 2, 1, 3, 2, 1, 1], [2, 1, 0, 0, 0, 0, 0, 0]]),
        "prompt_lengths": mx.array([8, 2]),
        "prompt_of": mx.array([1, 0, 1]),
        "inputs": mx.array([[3, 2, 1], [2, 2, 3], [3, 1, 1]]),
    }
    try:
        shared = completion_outputs(model, batch, len(model.layers))
        mx.eval(shared)
    except (AttributeError, IndexError, TypeError, ValueError):
        return False  # the model reads other attributes of a cache, or expects its offset to be one number
    tokens, start = unshared_rows(batch)
    positions = start[:, None] + mx.arange(batch["inputs"].shape[1])
    alone = mx.take_along_axis(model(tokens), positions[:, :, None], axis=1)
    return all(same_logits(*pair) for pair in zip(shared, alone, strict=True))
