"""The KV cache of a batch whose rows come and go, for kernels that read and write each row separately (CUDA).

Token t of a row is in column t of the row, from its first token to its last. Nothing is ever shifted, no array changes
its shape while rows come and go, and a decoding step that was compiled once serves a whole run. `window` does the same
for back ends without such kernels.

The kernels (`slot_kernels`) write into the cache without MLX's knowledge. As an MLX output, the whole cache would be
copied at every step, which takes longer than the step at 256 rows. The hidden write is safe for two reasons. Only
these kernels read the cache. And each call of `mx.async_eval` is a separate submission to one stream, which runs them
in order: a step reads what was placed before it, and writes where no earlier step reads any more. Therefore `place`
submits its copy at once, and never together with a step.

Depends on columns and rows only, not on tokens and samples.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.policy.decoding.draw import Array
from grpo_actors.policy.decoding.slot_kernels import Past, place_prompts
from grpo_actors.policy.decoding.window import Prompts

#: The number of columns is a multiple of this, so that few shapes are compiled.
COLUMN_MULTIPLE = 256


class Slots:
    """The cache of all layers, with the length of each row and whether it is in use."""

    def __init__(self, rows: int, max_new_tokens: int) -> None:
        """Create free rows, each with capacity for `max_new_tokens` after any prompt that it gets."""
        #: Tokens of each row: the column and the position of its next token. 0 in a free row, which is still
        #: computed, and sees only the token that it is fed.
        self.lengths: Array = np.zeros(rows, np.int32)
        self.live: Array = np.zeros(rows, np.bool_)
        #: Keys and values [L, 2, R, H, columns, D]; None before the first prompt.
        self.cache: mx.array | None = None
        #: Whether prompts were placed since a step was submitted to another stream than MLX's (`recorded_step`).
        self.changed = False
        #: [2 R] uint32, written by such a step: the tokens that it drew, and the bits of their log-probs.
        self.drawn = mx.zeros(2 * rows, mx.uint32)
        # One extra column: the end of a row is detected one step late.
        self._room = max_new_tokens + 1

    def place(self, rows: Array, prompts: Prompts, chosen: Array) -> None:
        """Copy the prompts `chosen` [len(rows)] of `prompts` into the free `rows`."""
        cache = self.cache = self._widened(prompts)
        width = mx.array([prompts.width], mx.int32)
        mx.async_eval(place_prompts(prompts.stacked, mx.array(chosen), cache, mx.array(rows), width))  # type: ignore[no-untyped-call]
        self.lengths[rows] = prompts.lengths[chosen]
        self.live[rows], self.changed = True, True

    def free(self, row: int) -> None:
        """Mark a row as free; its past is no longer needed."""
        self.live[row], self.lengths[row] = False, 0

    def reserve(self) -> None:
        """Do nothing: `place` has made the columns already."""

    def advance(self) -> None:
        """Count the tokens that the step has written."""
        self.lengths = self.lengths + self.live

    def _widened(self, prompts: Prompts) -> mx.array:
        """Return the cache, with enough columns for these prompts and their completions."""
        columns = -(-(prompts.width + self._room) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        if self.cache is None:
            layers, two, _, heads, _, size = prompts.stacked.shape
            return mx.zeros((layers, two, len(self.lengths), heads, columns, size), prompts.stacked.dtype)
        more = columns - self.cache.shape[4]
        return self.cache if more <= 0 else mx.pad(self.cache, [(0, 0)] * 4 + [(0, more), (0, 0)])


class SlotLayer(Past):
    """One layer's slots during a step, with the cache interface of mlx-lm's models."""

    @property
    def offset(self) -> mx.array:
        """Positions [R] int32 of the tokens fed now, for their rotation."""
        return self.lengths

    @staticmethod
    def make_mask(*_: Any, window_size: int | None = None, **__: Any) -> None:
        """Return None: the kernel needs no mask, because a row sees all of its tokens."""
        assert window_size is None

    @staticmethod
    def update_and_fetch(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the step's own keys and values [R, H, 1, D]; the kernel writes them into the cache."""
        return keys, values
