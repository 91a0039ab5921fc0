"""Pinned host memory, which a CUDA device reads and writes directly over the bus, at bus speed.

MLX moves arrays between device and host through managed memory, one page fault at a time: a round trip of 1 GB
takes a second and a half (H100). Memory that is registered with the driver stays in place. Our own kernels copy
between it and MLX's arrays, and no host core is kept busy.

Depends on bytes and addresses only, not on their meaning. Without CUDA nothing is pinned: `pin` returns None.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.policy.cuda_driver import Driver, driver
from grpo_actors.policy.cuda_kernel import cuda_kernel
from grpo_actors.policy.device import on_cuda

#: Threads per block, and blocks. A few blocks already fill the bus; the rest of the device stays free for the learner.
THREADS, BLOCKS = 256, 64

#: Flags of cuMemHostRegister: valid in every context, and mapped into the device's address space.
_PORTABLE_AND_MAPPED = 0x01 | 0x02

# 16 bytes at a time (both sides are aligned to 16), then the remaining bytes.
_COPY = """
    const long at = blockIdx.x * (long)blockDim.x + threadIdx.x, all = gridDim.x * (long)blockDim.x;
    const long size = bytes[0];
    for (long i = at; i < size / 16; i += all)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    for (long i = size / 16 * 16 + at; i < size; i += all) to[i] = from[i];
"""
_STORE = (
    """
    const char* from = reinterpret_cast<const char*>(array);
    char* to = reinterpret_cast<char*>(address[0]);
"""
    + _COPY
    + "    if (at == 0) done[0] = 1;"
)
_LOAD = (
    """
    const char* from = reinterpret_cast<const char*>(address[0]);
    char* to = reinterpret_cast<char*>(out);
"""
    + _COPY
)


class Pinned:
    """Memory registered with the driver until `close`; it must stay mapped until then."""

    def __init__(self, memory: memoryview, driver: Driver) -> None:
        """Register `memory` with the driver.

        Raises:
            OSError: the driver refuses.
        """
        self._driver = driver
        self._address = np.frombuffer(memory, np.uint8).ctypes.data
        size = ctypes.c_size_t(memory.nbytes)
        driver.call("cuMemHostRegister_v2", ctypes.c_void_p(self._address), size, _PORTABLE_AND_MAPPED)

    def store(self, arrays: Mapping[int, mx.array]) -> Sequence[mx.array]:
        """Copy arrays [n] to their offsets (bytes, multiples of 16).

        The copy happens when the caller evaluates the returned arrays.
        """
        kernel = cuda_kernel("pinned_store", ("array", "address", "bytes"), ("done",), _STORE)
        done = []
        for offset, array in arrays.items():
            inputs = [array, self._at(offset), mx.array([array.nbytes], mx.int64)]
            done += kernel(inputs=inputs, output_shapes=[(1,)], output_dtypes=[mx.uint8], **_GRID)
        return done

    def load(self, size: int) -> mx.array:
        """Return the first `size` bytes as an array [size] of uint8; the bytes must not change until it is evaluated."""
        kernel = cuda_kernel("pinned_load", ("address", "bytes"), ("out",), _LOAD)
        inputs = [self._at(0), mx.array([size], mx.int64)]
        out: mx.array
        (out,) = kernel(inputs=inputs, output_shapes=[(size,)], output_dtypes=[mx.uint8], **_GRID)
        return out

    def close(self) -> None:
        """Unregister the memory."""
        self._driver.call("cuMemHostUnregister", ctypes.c_void_p(self._address))

    def _at(self, offset: int) -> mx.array:
        return mx.array([self._address + offset], mx.int64)


def pin(memory: memoryview) -> Pinned | None:
    """Pin memory that begins at a multiple of 16 bytes; None without CUDA, or if the driver accepts no more."""
    if not on_cuda() or not memory.nbytes:
        return None
    try:
        return Pinned(memory, driver())
    except OSError:
        return None


_GRID: dict[str, Any] = {"grid": (THREADS * BLOCKS, 1, 1), "threadgroup": (THREADS, 1, 1)}
