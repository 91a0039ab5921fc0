"""Read a CUDA device's arrays through pinned memory, while the device computes on.

The host must not touch the arrays themselves: MLX would move them to managed memory, where kernels in flight may be
using them. Our own kernel copies them instead, part by part, into memory that the host reads (`policy.pinned`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from queue import SimpleQueue
from typing import Protocol

import mlx.core as mx

from grpo_actors.policy.pinned import pin
from grpo_actors.rundir.tensor_files import THREADS

#: Bytes of each thread's pinned memory.
ROOM_BYTES = 32 << 20
#: Parts begin at multiples of this number of bytes in pinned memory, as `Pinned.store` requires.
_ALIGNMENT = 16


class Room(Protocol):
    """Pinned memory, as `policy.pinned.Pinned` provides it."""

    def store(self, arrays: Mapping[int, mx.array]) -> Sequence[mx.array]:
        """Copy arrays to their offsets when the result is evaluated."""

    def close(self) -> None:
        """Unpin the memory."""


class Staging:
    """Pinned memory for each of the threads that write; its `read` is a `tensor_files.Reader`."""

    def __init__(self, rooms: Sequence[tuple[memoryview, Room]]) -> None:
        self._rooms = rooms
        self._free: SimpleQueue[tuple[memoryview, Room]] = SimpleQueue()
        for room in rooms:
            self._free.put(room)
        # Makes and evaluates all arrays of this class: MLX's streams belong to the thread that uses them.
        self._device = ThreadPoolExecutor(1, thread_name_prefix="staging")

    def read(self, arrays: Sequence[mx.array]) -> Iterator[memoryview]:
        """Yield the bytes of flat arrays of uint8, in order; each piece is valid until the next."""
        memory, room = self._free.get()
        try:
            for parts in _batches([array.size for array in arrays], len(memory)):
                self._device.submit(_store, room, arrays, parts).result()
                for offset, _, start, end in parts:
                    yield memory[offset : offset + end - start]
        finally:
            self._free.put((memory, room))

    def close(self) -> None:
        """Unpin the memory; nothing may be reading."""
        self._device.shutdown()
        for _, room in self._rooms:
            room.close()


def open_staging(
    pin: Callable[[memoryview], Room | None] = pin, room_bytes: int = ROOM_BYTES
) -> Staging | None:
    """Pin memory for `THREADS` readers; None without CUDA, or if the driver accepts no more."""
    rooms: list[tuple[memoryview, Room]] = []
    for _ in range(THREADS):
        memory = memoryview(mmap(-1, room_bytes))
        room = pin(memory)
        if room is None:
            for _, pinned in rooms:
                pinned.close()
            return None
        rooms.append((memory, room))
    return Staging(rooms)


#: Offset in pinned memory, number of the array, and the first and last + 1 of its bytes.
_Part = tuple[int, int, int, int]


def _store(room: Room, arrays: Sequence[mx.array], parts: Sequence[_Part]) -> None:
    mx.eval(room.store({offset: arrays[number][start:end] for offset, number, start, end in parts}))


def _batches(sizes: Sequence[int], room: int) -> Iterator[list[_Part]]:
    """Divide arrays of these sizes, in order, into parts that fit into `room` bytes together."""
    batch: list[_Part] = []
    used = 0
    for number, size in enumerate(sizes):
        start = 0
        while start < size:
            if used >= room:
                yield batch
                batch, used = [], 0
            end = min(size, start + room - used)
            batch.append((used, number, start, end))
            used += -(-(end - start) // _ALIGNMENT) * _ALIGNMENT
            start = end
    if batch:
        yield batch
