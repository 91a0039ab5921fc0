"""The KV cache of a batch whose rows come and go, where kernels read and write each row by itself (CUDA).

A row's token t stands in column t of the row, from its first token to its last: nothing is ever shifted, no
array changes its shape while rows come and go, and a step of decoding that was compiled once serves a whole run.
`window` is the same for back ends without such kernels.

The kernels write into the cache (`slot_kernels`), and MLX is not told: as an output it would be a
copy of the whole at every step, which at 256 rows takes longer than the step. That is right because the
cache is read by these kernels alone, and each call of `mx.async_eval` is a submission of its own to one stream, which
runs them in order: a step reads what was placed before it, and writes where no earlier one reads any more. So
what `place` does is submitted there and then, and never together with a step.

Knows columns and rows; refuses to know tokens and samples.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.policy.decoding.draw import Array
from grpo_actors.policy.decoding.slot_kernels import Past, place_prompts
from grpo_actors.policy.decoding.window import Prompts

#: Columns come in multiples of it: few shapes are compiled.
COLUMN_MULTIPLE = 256


class Slots:
    """Which rows are taken, and how many tokens each holds."""

    def __init__(self, rows: int, max_new_tokens: int) -> None:
        """Free rows, each with room for `max_new_tokens` after any prompt that it will be given."""
        #: Tokens of each row, which is the column and the position of its next one; 0 in a free row, which is
        #: computed along, and sees nothing but the token that it is fed.
        self.lengths: Array = np.zeros(rows, np.int32)
        self.live: Array = np.zeros(rows, np.bool_)
        #: Keys and values [L, 2, R, H, columns, D]; None: none yet.
        self.cache: mx.array | None = None
        # A row that ends is seen to have ended one step late.
        self._room = max_new_tokens + 1

    def place(self, rows: Array, prompts: Prompts, chosen: Array) -> None:
        """Give the free `rows` the prompts `chosen` [len(rows)] of `prompts`, to go on from."""
        cache = self.cache = self._widened(prompts)
        width = mx.array([prompts.width], mx.int32)
        mx.async_eval(place_prompts(prompts.stacked, mx.array(chosen), cache, mx.array(rows), width))  # type: ignore[no-untyped-call]
        self.lengths[rows] = prompts.lengths[chosen]
        self.live[rows] = True

    def free(self, row: int) -> None:
        """The row's past is of no use any more."""
        self.live[row], self.lengths[row] = False, 0

    def make_room(self) -> None:
        """There is room: it was made when the rows were placed."""

    def advance(self) -> None:
        """The step's tokens have been written."""
        self.lengths = self.lengths + self.live

    def _widened(self, prompts: Prompts) -> mx.array:
        """The cache, with columns for these prompts and all that follows them."""
        columns = -(-(prompts.width + self._room) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        if self.cache is None:
            layers, two, _, heads, _, size = prompts.stacked.shape
            return mx.zeros((layers, two, len(self.lengths), heads, columns, size), prompts.stacked.dtype)
        more = columns - self.cache.shape[4]
        return self.cache if more <= 0 else mx.pad(self.cache, [(0, 0)] * 4 + [(0, more), (0, 0)])


class SlotLayer(Past):
    """One layer's slots during a step, with the methods by which mlx-lm's models use a cache."""

    @property
    def offset(self) -> mx.array:
        """[R] int32: positions of the tokens fed now, which is what rotates them."""
        return self.lengths

    @staticmethod
    def make_mask(*_: Any, window_size: int | None = None, **__: Any) -> None:
        """None: the kernel knows what a row sees, which is all of its tokens."""
        assert window_size is None

    @staticmethod
    def update_and_fetch(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The step's own keys and values [R, H, 1, D], which the kernel writes beside those that are there."""
        return keys, values
