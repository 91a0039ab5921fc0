"""The KV cache of a batch whose rows come and go.

All rows write their next token into the same column, so a decoding step is one slice assignment per layer. The columns
are a ring: the next token replaces the oldest column, which no row needs any more. So a column is known by its age, the
number of steps since it was written. A row at position p sees the ages 0 to p: its own tokens. What is older belongs to
an earlier row. A row that ends is free for the next completion at once.

A ring has as many columns as its longest row has tokens, at most those of the layer's sliding window.

With `kv_bits`, keys and values are stored in 8 or 4 bits, and unpacked for one layer at a time.

With a mask, one assignment for all rows is the cheap way. With kernels that read each row separately, `slots` is.

Depends on columns and rows only, not on tokens and samples. Works for models whose layers all cache keys and values of
every position, or of the last ones (mlx-lm's `KVCache` and `RotatingKVCache`).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from grpo_actors.policy.decoding.draw import Array

#: With few_shapes, prompts that run together are padded to a multiple of this number of columns.
PROMPT_MULTIPLE = 64
#: A ring's number of columns is a multiple of this, or its bound: each growth copies it.
GROWTH = 64
#: Numbers of a head that may share a scale and an offset; the first that divides its width is used.
GROUP_SIZES = (64, 32)


def keeps_keys_and_values(model: Any) -> bool:
    """Return whether every layer caches keys and values, of every position or of the last ones."""
    return all(
        type(cache) is KVCache or (type(cache) is RotatingKVCache and not cache.keep)
        for cache in make_prompt_cache(model)
    )


class Window:
    """The length of each row, and the rings of columns. The layers' caches (`layers`) read them at every step."""

    def __init__(self, model: Any, rows: int, kv_bits: int = 0) -> None:
        """Create an empty window with `rows` free rows; `kv_bits`: bits of a key's or value's number, 0: as computed."""
        #: Tokens of each row: the position of its next token. 0 in a free row, which is still computed, and sees only
        #: the token that it is fed.
        self.lengths: Array = np.zeros(rows, np.int32)
        self.live: Array = np.zeros(rows, np.bool_)
        bounds = [getattr(cache, "max_size", None) for cache in make_prompt_cache(model)]
        rings = {bound: Ring(bound) for bound in bounds}
        self._rings = tuple(rings.values())
        self.layers = [LayerWindow(self, rings[bound], kv_bits) for bound in bounds]
        self._upload()

    def place(self, rows: Array, prompts: "Prompts", chosen: Array) -> None:
        """Copy the prompts `chosen` [len(rows)] of `prompts` into the free `rows`."""
        self.lengths[rows], self.live[rows] = prompts.lengths[chosen], True
        self.reserve()
        index, longest = mx.array(rows), int(prompts.lengths[chosen].max())
        # One gather per layer selects the prompts of all rows.
        take = None if np.array_equal(chosen, np.arange(len(prompts.lengths))) else mx.array(chosen)
        for layer, pair in zip(self.layers, prompts.aligned_right, strict=True):
            first = prompts.width - min(longest, layer.ring.columns - 1)
            last_ones = [array[:, :, first:] for array in pair]
            layer.place(index, *(array if take is None else array[take] for array in last_ones))
        self._upload()

    def free(self, row: int) -> None:
        """Mark a row as free; its past is no longer needed."""
        self.live[row], self.lengths[row] = False, 0

    def reserve(self) -> None:
        """Ensure that the next column replaces none that a row needs."""
        for ring in self._rings:
            ring.fit(int(self.lengths.max()) + 1, [layer for layer in self.layers if layer.ring is ring])

    def advance(self) -> None:
        """Move to the next column, after the step has written its tokens."""
        for ring in self._rings:
            ring.next = (ring.next + 1) % ring.columns
        self.lengths = self.lengths + self.live
        self._upload()

    def keep(self, rows: Array) -> None:
        """Keep only these rows, in this order."""
        index = mx.array(rows)
        for layer in self.layers:
            layer.arrays = [array[index] for array in layer.arrays]
        self.lengths, self.live = self.lengths[rows], self.live[rows]
        self._upload()

    def add(self, rows: int) -> None:
        """Add `rows` free rows."""
        for layer in self.layers:
            layer.arrays = [mx.pad(array, [(0, rows), (0, 0), (0, 0), (0, 0)]) for array in layer.arrays]
        self.lengths = np.append(self.lengths, np.zeros(rows, np.int32))
        self.live = np.append(self.live, np.zeros(rows, np.bool_))
        self._upload()

    def _upload(self) -> None:
        #: Positions [R] int32 of the tokens fed next, for all layers.
        self.positions = mx.array(self.lengths)


class Ring:
    """The columns of the layers that keep the same number of tokens."""

    def __init__(self, bound: int | None) -> None:
        #: Most tokens that a row sees, its own included; None: all.
        self.bound = bound
        #: Number of columns, and the one that is written next.
        self.columns = self.next = 0

    def fit(self, tokens: int, layers: "Sequence[LayerWindow]") -> None:
        """Give its `layers` columns for rows of `tokens` tokens; drop columns if most of them are too old."""
        wanted = -(-tokens // GROWTH) * GROWTH
        if self.bound is not None:
            wanted = min(wanted, self.bound)
        if wanted <= self.columns <= 2 * wanted:
            return
        kept = min(self.columns, wanted)
        in_order = mx.array((self.next - kept + np.arange(kept)) % max(self.columns, 1))
        for layer in layers:
            layer.arrays = [
                mx.pad(mx.take(array, in_order, axis=2), [(0, 0), (0, 0), (0, wanted - kept), (0, 0)])
                for array in layer.arrays
            ]
        self.columns, self.next = wanted, kept % wanted

    def before(self, count: int) -> Iterator[tuple[slice, slice]]:
        """Yield the slots of the `count` columns before the next, as slices, with the part of `range(count)` in each."""
        older = max(0, count - self.next)  # at the end of the ring
        if older:
            yield slice(self.columns - older, self.columns), slice(0, older)
        if older < count:
            yield slice(self.next - count + older, self.next), slice(older, count)

    @property
    def ages(self) -> Array:
        """Age of each column, as an int32 array [columns]; that of the next column is 0."""
        return (self.next - np.arange(self.columns, dtype=np.int32)) % self.columns


class LayerWindow:
    """One layer's keys and values, with the cache interface of mlx-lm's models."""

    def __init__(self, window: Window, ring: Ring, kv_bits: int) -> None:
        self.window, self.ring, self.kv_bits = window, ring, kv_bits
        #: Keys and values [R, H, columns, D]; or with `kv_bits`, for both the packed numbers, the scales and the offsets.
        self.arrays: list[mx.array] = []

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
        """Return a mask [R, 1, 1, columns] bool: the columns that each row may see."""
        assert tokens == 1
        ages = mx.array(self.ring.ages)
        seen = ages <= self.window.positions[:, None]
        if window_size is not None:
            seen = seen & (ages < window_size)
        return seen[:, None, None, :]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the step's keys and values [R, H, 1, D]; return those of all columns."""
        at = self.ring.next
        for array, new in zip(self.arrays, self._packed(keys, values), strict=True):
            array[..., at : at + 1, :] = new
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return the keys and values [R, H, columns, D], for this layer and those that share them."""
        if not self.kv_bits:
            return self.arrays[0], self.arrays[1]
        return self._unpacked(*self.arrays[:3]), self._unpacked(*self.arrays[3:])

    def place(self, rows: mx.array, keys: mx.array, values: mx.array) -> None:
        """Write the keys and values [len(rows), H, width, D] of `rows` into the columns before the next."""
        packed = self._packed(keys, values)
        if not self.arrays:
            shape = (len(self.window.lengths), keys.shape[1], self.ring.columns)
            self.arrays = [mx.zeros((*shape, new.shape[3]), new.dtype) for new in packed]
        for array, new in zip(self.arrays, packed, strict=True):
            for slots, part in self.ring.before(keys.shape[2]):
                array[rows, :, slots] = new[:, :, part]

    def _packed(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Return keys and values as they are stored."""
        if not self.kv_bits:
            return [keys, values]
        return [part for array in (keys, values) for part in self._quantized(array)]

    def _quantized(self, array: mx.array) -> Sequence[mx.array]:
        size = group_size(array.shape[3])
        assert size is not None
        return mx.quantize(array, group_size=size, bits=self.kv_bits)

    def _unpacked(self, packed: mx.array, scales: mx.array, offsets: mx.array) -> mx.array:
        size = packed.shape[3] * 32 // self.kv_bits // scales.shape[3]
        unpacked: mx.array = mx.dequantize(packed, scales, offsets, group_size=size, bits=self.kv_bits)
        return unpacked


def group_size(width: int) -> int | None:
    """Return how many numbers of a head of this width share a scale; None if it cannot be quantised."""
    return next((size for size in GROUP_SIZES if width and width % size == 0), None)


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
