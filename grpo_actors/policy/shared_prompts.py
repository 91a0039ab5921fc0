"""A prompt that is computed once for all of its completions, with a gradient.

Two passes: the prompts by themselves, whose layers keep their keys and values; then the completions, whose
tokens see those of their own prompt and of their own past. The gradient of all completions of a prompt flows
back into its pass through keys and values. Dropout draws once for a prompt, and so the same for its completions.

Knows the cache by which mlx-lm's models read positions and masks; refuses to know what is predicted. For
models whose layers all keep keys and values of every position (mlx-lm's plain `KVCache`): `shares_prompts`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, create_attention_mask, make_prompt_cache

from grpo_actors.policy.model import same_logits

#: A position that no token comes after: that of padding, so that nothing sees it.
_NEVER = 2**31 - 1


class Layer:
    """One layer's keys and values [P, H, L, D] of the prompts, as its cache.

    They carry a gradient: whoever computes a layer again must hand `given` in as its arguments and `kept` out.
    """

    def __init__(self, given: list[mx.array]) -> None:
        #: Keys and values that the layer reads, none in the first pass.
        self.given = given
        #: Keys and values that the layer leaves, none in the second.
        self.kept: list[mx.array] = []


class PromptLayer(Layer):
    """In the first pass: keeps what the layer computes."""

    offset = 0

    def make_mask(self, tokens: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal. Prompts are padded on the right, where no token looks."""
        return create_attention_mask(tokens, 0, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep [P, H, L, D]."""
        self.kept = [keys, values]
        return keys, values


class CompletionLayer(Layer):
    """In the second pass: each row's prompt before its own tokens."""

    def __init__(self, given: list[mx.array], rows: "Rows") -> None:
        super().__init__(given)
        self._rows = rows

    @property
    def offset(self) -> mx.array:
        """[N] int32: the position of each row's first token."""
        return self._rows.offsets

    def make_mask(
        self,
        tokens: int,
        *,
        return_array: bool = False,  # noqa: ARG002 - the signature is mlx-lm's
        window_size: int | None = None,
    ) -> mx.array:
        """[N, 1, C, L + C] bool."""
        return self._rows.mask(tokens, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Own [N, H, C, D] -> [N, H, L + C, D]."""
        prompt_keys, prompt_values = self.given
        return self._rows.after_prompts(prompt_keys, keys), self._rows.after_prompts(prompt_values, values)


class Rows:
    """Which prompt each completion goes on from."""

    def __init__(self, prompt_of: mx.array, prompt_lengths: mx.array, prompt_keys: mx.array) -> None:
        """[N], [P], and the keys [P, H, L, D] of any layer, of which width and type are read."""
        self.offsets = prompt_lengths[prompt_of]
        # [N, P]. Once, and here: a type changed in every recomputed block is what MLX 0.32 fails to compile.
        self._chooses = (prompt_of[:, None] == mx.arange(len(prompt_keys))).astype(prompt_keys.dtype)
        columns = mx.arange(prompt_keys.shape[2])
        self._prompt_positions = mx.where(columns < self.offsets[:, None], columns, _NEVER)

    def mask(self, tokens: int, window_size: int | None) -> mx.array:
        """Which keys each token of a row sees, by their positions in the row's text."""
        own = self.offsets[:, None] + mx.arange(tokens)
        keys = mx.concatenate([self._prompt_positions, own], axis=1)[:, None]
        seen = keys <= own[:, :, None]
        if window_size is not None:
            seen = seen & (keys > own[:, :, None] - window_size)
        return seen[:, None]

    def after_prompts(self, prompts: mx.array, own: mx.array) -> mx.array:
        """[P, H, L, D] and [N, H, C, D] -> [N, H, L + C, D].

        Each prompt is taken by a product with ones and zeros: exact, and its gradient is a product too, where
        that of an index adds up element by element (17 times slower on a CPU, and in bfloat16 less precise).
        """
        chosen = self._chooses @ prompts.reshape(len(prompts), -1)
        return mx.concatenate([chosen.reshape(-1, *prompts.shape[1:]), own], axis=2)


def completion_outputs(
    model: Callable[..., mx.array], batch: Mapping[str, mx.array], layers: int
) -> mx.array:
    """[N, C, …], what `model` (or its body) of so many layers gives for `inputs`, each row after its prompt.

    Args:
        model: Maps ids [.., T] and a cache to [.., T, …].
        batch: `MicroBatch.arrays()`: prompts, prompt_lengths, prompt_of and inputs are read.
        layers: How many the model has.
    """
    first = [PromptLayer([]) for _ in range(layers)]
    model(batch["prompts"], cache=first)
    rows = Rows(batch["prompt_of"], batch["prompt_lengths"], first[0].kept[0])
    return model(batch["inputs"], cache=[CompletionLayer(layer.kept, rows) for layer in first])


def whole_rows(batch: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
    """Each completion after a prompt of its own: tokens [N, L + C], and [N] where the last prompt token is."""
    prompts, inputs, prompt_of = batch["prompts"], batch["inputs"], batch["prompt_of"]
    start = batch["prompt_lengths"][prompt_of]
    both = mx.concatenate([prompts[prompt_of], inputs], axis=1)
    columns, last = mx.arange(both.shape[1]), both.shape[1] - 1
    gap = prompts.shape[1] - start[:, None]
    places = mx.where(columns < start[:, None], columns, mx.minimum(columns + gap, last))
    return mx.take_along_axis(both, places, axis=1), start


def shares_prompts(model: Any) -> bool:
    """Whether a model gives after shared prompts what it gives otherwise: tried on two prompts of unlike lengths."""
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
        return False  # it reads other things of a cache, or takes its offset for one number
    tokens, start = whole_rows(batch)
    positions = start[:, None] + mx.arange(batch["inputs"].shape[1])
    alone = mx.take_along_axis(model(tokens), positions[:, :, None], axis=1)
    return all(same_logits(*pair) for pair in zip(shared, alone, strict=True))
