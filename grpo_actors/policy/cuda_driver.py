"""The CUDA driver, for the few things that MLX does not offer: pinned memory, and steps that are recorded once.

All of it happens in the context that MLX uses, the device's primary one, so that MLX's arrays can be read and written.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from grpo_actors.policy.shared_library import check

#: Flags: of a stream, that it does not wait for the default one; of a capture, that no other call is forbidden meanwhile;
#: of an event, that it takes no time and that its waiter sleeps.
_NON_BLOCKING, _RELAXED, _NO_TIMING_AND_SLEEP = 0x01, 0x02, 0x02 | 0x01

Array = np.ndarray[Any, np.dtype[Any]]


class Driver:
    """The driver in MLX's context. Each call makes this context the thread's current one."""

    def __init__(self) -> None:
        """Open the driver.

        Raises:
            OSError: there is none.
        """
        self._library = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        check(self._library.cuInit(0), "cuInit", "CUDA")
        retained = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), 0)
        check(retained, "cuDevicePrimaryCtxRetain", "CUDA")

    def call(self, name: str, *arguments: Any) -> None:
        """Call one function of the driver with arguments that ctypes can pass.

        Raises:
            CudaError: the driver refuses.
        """
        check(self._library.cuCtxSetCurrent(self._context), "cuCtxSetCurrent", "CUDA")
        check(getattr(self._library, name)(*arguments), name, "CUDA")

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that writes a handle to its first argument, and return the handle."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle

    def synchronize(self) -> None:
        """Wait until the device has done all that this process has submitted, to any stream."""
        self.call("cuCtxSynchronize")


@lru_cache(maxsize=1)
def driver() -> Driver:
    """Return the driver; raises OSError if there is none."""
    return Driver()


@cache
def function(symbol: str, code: bytes) -> ctypes.c_void_p:
    """Return a kernel of machine code as the driver launches it; it stays loaded."""
    module = driver().made("cuModuleLoadData", code)
    return driver().made("cuModuleGetFunction", module, symbol.encode())


class HostBuffer:
    """Pinned host memory of `count` numbers, which the device copies to and from without the host's help."""

    def __init__(self, count: int, dtype: Any) -> None:
        self.size = count * np.dtype(dtype).itemsize
        self.address = driver().made("cuMemHostAlloc", ctypes.c_size_t(self.size), 0)
        assert self.address.value is not None
        memory = (ctypes.c_char * self.size).from_address(self.address.value)
        #: The memory itself; must not be used after `close`.
        self.array: Array = np.frombuffer(memory, dtype)

    def close(self) -> None:
        """Free the memory."""
        driver().call("cuMemFreeHost", self.address)


class Recording:
    """Work that was submitted to a stream once, and is submitted again as a whole by one call."""

    def __init__(self, stream: "Stream", submit: Callable[[], None]) -> None:
        """Record what `submit` submits to `stream`; none of it runs."""
        driver().call("cuStreamBeginCapture_v2", stream.handle, _RELAXED)
        graph = ctypes.c_void_p()
        try:
            submit()
        finally:
            driver().call("cuStreamEndCapture", stream.handle, ctypes.byref(graph))
        try:
            self._executable = driver().made("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
        finally:
            driver().call("cuGraphDestroy", graph)
        self._stream = stream

    def run(self) -> None:
        """Submit the work."""
        driver().call("cuGraphLaunch", self._executable, self._stream.handle)

    def close(self) -> None:
        """Drop the recording; what was submitted must have ended."""
        driver().call("cuGraphExecDestroy", self._executable)


class Event:
    """A mark in a stream, to wait for."""

    def __init__(self) -> None:
        self._handle = driver().made("cuEventCreate", _NO_TIMING_AND_SLEEP)

    def mark(self, stream: "Stream") -> None:
        """Move the mark behind everything that was submitted to `stream` so far."""
        driver().call("cuEventRecord", self._handle, stream.handle)

    def wait(self) -> None:
        """Wait until the device has passed the mark; other threads go on."""
        driver().call("cuEventSynchronize", self._handle)

    def close(self) -> None:
        """Drop the event."""
        driver().call("cuEventDestroy_v2", self._handle)


class Stream:
    """A queue of work of its own: it does not wait for MLX's, nor MLX's for it."""

    def __init__(self) -> None:
        self.handle = driver().made("cuStreamCreate", _NON_BLOCKING)

    def launch(
        self,
        kernel: ctypes.c_void_p,
        blocks: tuple[int, int, int],
        threads: int,
        addresses: Sequence[int],
        sizes: Sequence[int] = (),
    ) -> None:
        """Submit a kernel whose parameters are addresses, followed by numbers of 32 bits."""
        values: list[Any] = [*map(ctypes.c_void_p, addresses), *map(ctypes.c_int, sizes)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        dimensions = map(ctypes.c_uint, (*blocks, threads, 1, 1, 0))
        driver().call("cuLaunchKernel", kernel, *dimensions, self.handle, pointers, None)

    def upload(self, buffer: HostBuffer, address: int) -> None:
        """Submit a copy of a buffer to the device."""
        arguments = ctypes.c_uint64(address), buffer.address, ctypes.c_size_t(buffer.size), self.handle
        driver().call("cuMemcpyHtoDAsync_v2", *arguments)

    def download(self, address: int, buffer: HostBuffer) -> None:
        """Submit a copy from the device to a buffer."""
        arguments = buffer.address, ctypes.c_uint64(address), ctypes.c_size_t(buffer.size), self.handle
        driver().call("cuMemcpyDtoHAsync_v2", *arguments)

    def wait(self) -> None:
        """Wait until everything submitted has ended."""
        driver().call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        """Drop the stream."""
        driver().call("cuStreamDestroy_v2", self.handle)
