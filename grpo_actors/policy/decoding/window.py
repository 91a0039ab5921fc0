"""The KV cache of a batch whose rows come and go.

All rows write their next token into the same column, so a decoding step is one slice assignment per layer. A row's
tokens are in the columns from its start to that column; left of its start is an earlier row's past, or nothing. The
position of a token is its column − the row's start. A row that ends is free for the next completion at once.
Columns that no row needs any more are cut off on the left.

With a mask, one assignment for all rows is the cheap way. With kernels that read each row separately, `slots` is.

Depends on columns and rows only, not on tokens and samples. Works for models whose layers all cache keys and values
of every position (mlx-lm's plain `KVCache`).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from grpo_actors.policy.decoding.draw import Array

#: With few_shapes, prompts that run together are padded to a multiple of this number of columns.
PROMPT_MULTIPLE = 64
#: A full window grows by this number of columns, unless a quarter of it can be cut off.
GROWTH = 256


class Window:
    """The columns that belong to each row. The layers' caches (`layers`) read it at every step."""

    def __init__(self, model: Any, rows: int) -> None:
        """Create an empty window with `rows` free rows."""
        #: First column of each row's tokens.
        self.starts: Array = np.zeros(rows, np.int32)
        #: Rows whose past is needed. The others are still computed, but never read.
        self.live: Array = np.zeros(rows, np.bool_)
        #: The column that the next token of every row goes to.
        self.end = 0
        self.layers = [LayerWindow(self) for _ in make_prompt_cache(model)]
        self._upload()

    def place(self, rows: Array, prompts: "Prompts", chosen: Array) -> None:
        """Copy the prompts `chosen` [len(rows)] of `prompts` into the free `rows`."""
        width = prompts.width
        if self.layers[0].keys is None:
            self.end = width
        elif width > self.end:
            self._shift(self.end - width)
        index = mx.array(rows)
        # One gather per layer selects the prompts of all rows.
        take = None if np.array_equal(chosen, np.arange(len(prompts.lengths))) else mx.array(chosen)
        for layer, (keys, values) in zip(self.layers, prompts.aligned_right, strict=True):
            layer.place(index, keys if take is None else keys[take], values if take is None else values[take])
        self.starts[rows] = self.end - prompts.lengths[chosen]
        self.live[rows] = True
        self._upload()

    def free(self, row: int) -> None:
        """Mark a row as free; its past is no longer needed."""
        self.live[row] = False

    def reserve(self) -> None:
        """Ensure that there is a column for the next token."""
        capacity = self.layers[0].capacity
        if self.end < capacity:
            return
        unused = int(self.starts[self.live].min()) if self.live.any() else self.end
        if 4 * unused >= capacity:
            self._shift(unused)
        else:
            for layer in self.layers:
                layer.resize(0, capacity + GROWTH)

    def advance(self) -> None:
        """Move to the next column, after the step has written its tokens."""
        self.end += 1
        self.positions = self.end - self.device_starts

    def keep(self, rows: Array) -> None:
        """Keep only these rows, in this order."""
        index = mx.array(rows)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.starts, self.live = self.starts[rows], self.live[rows]
        self._upload()

    def add(self, rows: int) -> None:
        """Add `rows` free rows."""
        for layer in self.layers:
            widths = [(0, rows), (0, 0), (0, 0), (0, 0)]
            layer.keys, layer.values = mx.pad(layer.keys, widths), mx.pad(layer.values, widths)
        # They see at least the column of their own token: a softmax over nothing is NaN.
        self.starts = np.append(self.starts, np.full(rows, self.end, np.int32))
        self.live = np.append(self.live, np.zeros(rows, np.bool_))
        self._upload()

    def _shift(self, columns: int) -> None:
        """Cut off `columns` on the left; a negative number adds columns there."""
        for layer in self.layers:
            layer.resize(columns, max(layer.capacity, layer.capacity - columns))
        self.starts = np.maximum(self.starts - columns, 0)
        self.end -= columns
        self._upload()

    def _upload(self) -> None:
        self.device_starts = mx.array(self.starts)
        #: Positions [R] int32 of the tokens fed next. Computed once for all layers: each kernel lengthens a step.
        self.positions = self.end - self.device_starts


class LayerWindow:
    """One layer's keys and values [R, H, columns, D], with the cache interface of mlx-lm's models."""

    keys: Any = None
    values: Any = None

    def __init__(self, window: Window) -> None:
        self.window = window

    @property
    def capacity(self) -> int:
        """Number of allocated columns."""
        return int(self.keys.shape[2])

    @property
    def offset(self) -> mx.array:
        """Positions [R] int32 of the tokens fed now, for their rotation."""
        return self.window.positions

    def make_mask(
        self,
        tokens: int,
        return_array: bool = False,  # noqa: ARG002, FBT001, FBT002 - the signature is mlx-lm's
        window_size: int | None = None,
    ) -> mx.array:
        """Return a mask [R, 1, 1, columns so far] bool: the columns that each row may see."""
        assert tokens == 1
        columns, end = mx.arange(self.window.end + 1), self.window.end
        seen = columns >= self.window.device_starts[:, None]
        if window_size is not None:
            seen = seen & (columns > end - window_size)
        return seen[:, None, None, :]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the step's keys and values [R, H, 1, D]; return those of all columns so far."""
        end = self.window.end
        self.keys[..., end : end + 1, :] = keys
        self.values[..., end : end + 1, :] = values
        return self.keys[..., : end + 1, :], self.values[..., : end + 1, :]

    def place(self, rows: mx.array, keys: mx.array, values: mx.array) -> None:
        """Write the keys and values [len(rows), H, width, D] of `rows` into the last columns."""
        end, width = self.window.end, keys.shape[2]
        if self.keys is None:
            shape = (len(self.window.starts), keys.shape[1], -(-(end + 1) // GROWTH) * GROWTH)
            self.keys = mx.zeros((*shape, keys.shape[3]), keys.dtype)
            self.values = mx.zeros((*shape, values.shape[3]), values.dtype)
        if width:
            self.keys[rows, :, end - width : end, :] = keys
            self.values[rows, :, end - width : end, :] = values

    def resize(self, first: int, capacity: int) -> None:
        """Keep the columns from `first` on (negative: add columns before them), and pad them to `capacity`."""
        self.keys, self.values = (_resized(array, first, capacity) for array in (self.keys, self.values))


class Prompts:
    """Keys and values of several prompts, all but their last token."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], *, few_shapes: bool = False) -> None:
        """Run all prompts through the model at once, padded on the right, where a causal model does not attend.

        Args:
            model: Maps tokens [P, T] and a cache to logits.
            prompts: The prompts' tokens; none is empty.
            few_shapes: Pad rows and columns further: CUDA's attention makes a plan for each new shape.
        """
        self.lengths: Array = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
        self.width = int(self.lengths.max())
        rows, columns = len(prompts), max(self.width, 1)
        if few_shapes:
            rows, columns = 2 ** (rows - 1).bit_length(), -(-columns // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        cache = make_prompt_cache(model)
        padded = np.zeros((rows, columns), np.int32)
        for row, prompt, length in zip(padded, prompts, self.lengths, strict=False):
            row[:length] = prompt[:-1]
        model(mx.array(padded), cache=cache)
        #: Keys and values [rows, H, columns, D] of each layer; token t is in column t.
        self.layers: list[tuple[mx.array, mx.array]] = [
            (layer.keys[..., :columns, :], layer.values[..., :columns, :]) for layer in cache
        ]

    @cached_property
    def stacked(self) -> mx.array:
        """The keys and values as one array [L, 2, rows, H, columns, D]; this frees `layers`."""
        pairs, self.layers = self.layers, []
        return mx.stack([mx.stack(list(pair)) for pair in pairs])

    @cached_property
    def aligned_right(self) -> list[tuple[mx.array, mx.array]]:
        """The keys and values in `width` columns, aligned so that every prompt's last token is in the last column."""
        # Column c of row r is its token c − (width − length).
        columns = np.arange(self.width)[None] - (self.width - self.lengths[:, None])
        index = mx.array(np.maximum(columns, 0))[:, None, :, None]
        return [
            (mx.take_along_axis(keys, index, axis=2), mx.take_along_axis(values, index, axis=2))
            for keys, values in self.layers
        ]


def _resized(array: mx.array, first: int, capacity: int) -> mx.array:
    kept = array[:, :, max(first, 0) :]
    before = max(-first, 0)
    after = capacity - before - kept.shape[2]
    return mx.pad(kept, [(0, 0), (0, 0), (before, after), (0, 0)])
