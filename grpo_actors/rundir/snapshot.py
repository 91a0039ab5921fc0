"""Host memory for a checkpoint of a CUDA device, so that the device need not hold its arrays until they are written.

While training goes on, the host must not touch the device's arrays: MLX would move them to managed memory, where
kernels in flight may be using them. So our own kernel copies them to pinned memory first, at bus speed
(`policy.pinned`), while training stands still. On a CPU and on Metal none of this is needed: the host reads arrays in
place.
"""

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import mlx.core as mx

from grpo_actors.host import available_bytes
from grpo_actors.policy.pinned import Pinned, pin
from grpo_actors.rundir.tensor_files import Remote, TensorFile

#: The most of the host's available memory that is pinned, as a share: the files that are written fill its cache, too.
MEMORY_SHARE = 0.5
#: Arrays begin at multiples of this number of bytes, as `Pinned.store` requires.
_ALIGNMENT = 16
#: Advice to the kernel, where it has it: larger pages are there sooner; a child process gets no copy of pinned ones.
_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTFORK")


class HostMemory:
    """Pinned memory that holds one checkpoint at a time."""

    def __init__(self, memory: memoryview, pinned: Pinned) -> None:
        self._memory = memory
        self._pinned = pinned

    def has_room(self, files: Sequence[TensorFile]) -> bool:
        """Return whether the arrays of the files fit."""
        return size_of(files) <= len(self._memory)

    def copy(self, files: Sequence[TensorFile]) -> list[TensorFile]:
        """Return the files with their arrays copied here, where the next call overwrites them.

        Call it on the thread that computes: MLX's streams belong to the thread that uses them.
        """
        stored: dict[int, mx.array] = {}
        copied: list[TensorFile] = []
        end = 0
        for file in files:
            data: dict[str, memoryview] = {}
            for name, array in file.data.items():
                assert not isinstance(array, memoryview)
                data[name] = self._memory[end : end + array.nbytes]
                if isinstance(array, Remote):  # the device never holds more than one of them
                    if array.nbytes:
                        mx.eval(self._pinned.store({end: array.data()}))
                elif array.size:
                    stored[end] = array
                end += _aligned(array.nbytes)
            copied.append(replace(file, data=data))
        mx.eval(self._pinned.store(stored))
        return copied

    def close(self) -> None:
        """Unpin the memory; nothing may be reading it."""
        self._pinned.close()


def reserve(
    size: int,
    pin: Callable[[memoryview], Pinned | None] = pin,
    available_bytes: Callable[[], int] = available_bytes,
) -> HostMemory | None:
    """Pin `size` bytes, which takes seconds for gigabytes; None if the host or the driver has not as many to give."""
    if size > MEMORY_SHARE * available_bytes():
        return None
    try:
        # Private: the kernel gives shared memory no large pages.
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    for advice in _ADVICE:
        with suppress(OSError, AttributeError):
            mapped.madvise(getattr(mmap, advice))
    memory = memoryview(mapped)
    pinned = pin(memory)
    return None if pinned is None else HostMemory(memory, pinned)


def size_of(files: Sequence[TensorFile]) -> int:
    """Return the bytes that the arrays of the files take in `HostMemory`."""
    return sum(_aligned(array.nbytes) for file in files for array in file.data.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
