"""What this machine can do at best: bytes copied and products computed a second, as MLX reaches them here.

The best of several rounds, not the median: it serves as a bound. All of it on one device, and copies of the
host's memory on one thread.
"""

import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.bench.floors import Rates
from grpo_actors.supervisor.machine import Machine

#: Bytes of the copied array: far above every cache, and long enough that starting the copy counts for nothing.
HOST_BYTES = 2**28
DEVICE_BYTES = 2**30
#: Sides of the square products tried, until one takes `LONG_ENOUGH_S`; the fastest counts.
SIDES = (256, 512, 1024, 2048, 4096, 8192)
LONG_ENOUGH_S = 0.02
ROUNDS = 5


def description() -> dict[str, Any]:
    """The machine, as it stands beside every figure."""
    device = mx.default_device()
    name = mx.device_info().get("device_name", "unknown")
    return {
        "device": f"{name} ({'GPU' if device.type == mx.DeviceType.gpu else 'CPU'})",
        "mlx": metadata.version("mlx"),
        "cores": Machine.here(asks_gpu=False).cores,
    }


def rates(dtype: mx.Dtype) -> Rates:
    """What floors are made of, for a model of this type; leaves nothing in MLX's memory."""
    measured = Rates(copy_bytes_per_s(), matmul_flops_per_s(dtype))
    mx.clear_cache()
    return measured


def copy_bytes_per_s() -> float:
    """Of the device's memory, read and written bytes both counted.

    On a CPU that of `host_copy_bytes_per_s`: MLX's own copy reaches a tenth of it there, and is no bound.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return host_copy_bytes_per_s()
    source = mx.zeros(DEVICE_BYTES // 4, mx.float32)
    mx.eval(source)
    # An addition has a copy's traffic, and MLX can not leave it out.
    return 2 * DEVICE_BYTES / _best_s(lambda: mx.eval(source + 1))


def host_copy_bytes_per_s() -> float:
    """Of the host's memory, on one thread, read and written bytes both counted."""
    # Ones: pages of zeros that were never written are all one page.
    source, target = np.ones(HOST_BYTES, np.uint8), np.empty(HOST_BYTES, np.uint8)
    return 2 * HOST_BYTES / _best_s(lambda: np.copyto(target, source))


def matmul_flops_per_s(dtype: mx.Dtype) -> float:
    """Multiplications and additions of a large square product, on random numbers of this type."""
    best = 0.0
    for side in SIDES:
        # Zeros would draw less power, and a GPU's clock rises with what it saves.
        one, other = (mx.random.normal((side, side), key=mx.random.key(i)).astype(dtype) for i in range(2))
        mx.eval(one, other)
        seconds = _best_s(partial(_multiply, one, other))
        best = max(best, 2 * side**3 / seconds)
        if seconds >= LONG_ENOUGH_S:
            break
    return best


def _multiply(one: mx.array, other: mx.array) -> None:
    mx.eval(one @ other)


def _best_s(work: Callable[[], object]) -> float:
    """Shortest of several rounds, after one that does not count."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])
