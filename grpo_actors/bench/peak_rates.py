"""Measure this machine's best rates: bytes copied and products computed a second, as far as MLX reaches them.

The rates serve as bounds, so the best of several rounds counts, not the median. Everything runs on one device;
copies of host memory use one thread.
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

#: Bytes of the copied array: far more than any cache, and so many that the time to start the copy is negligible.
HOST_BYTES = 2**28
DEVICE_BYTES = 2**30
#: Sides of the square products to try, until one takes `LONG_ENOUGH_S`; the fastest counts.
SIDES = (256, 512, 1024, 2048, 4096, 8192)
LONG_ENOUGH_S = 0.02
ROUNDS = 5


def description() -> dict[str, Any]:
    """Return the description of the machine that goes with the figures."""
    device = mx.default_device()
    name = mx.device_info().get("device_name", "unknown")
    return {
        "device": f"{name} ({'GPU' if device.type == mx.DeviceType.gpu else 'CPU'})",
        "mlx": metadata.version("mlx"),
        "cores": Machine.here(asks_gpu=False).cores,
    }


def rates(dtype: mx.Dtype) -> Rates:
    """Measure the rates for a model of this type; leaves nothing in MLX's memory."""
    measured = Rates(copy_bytes_per_s(), matmul_flops_per_s(dtype))
    mx.clear_cache()
    return measured


def copy_bytes_per_s() -> float:
    """Measure the copy rate of the device's memory; read and written bytes both count.

    On a CPU this is `host_copy_bytes_per_s`: MLX's own copy reaches only a tenth of that there, so it is no bound.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return host_copy_bytes_per_s()
    source = mx.zeros(DEVICE_BYTES // 4, mx.float32)
    mx.eval(source)
    # An addition moves as many bytes as a copy, and MLX cannot optimise it away.
    return 2 * DEVICE_BYTES / _best_s(lambda: mx.eval(source + 1))


def host_copy_bytes_per_s() -> float:
    """Measure the copy rate of the host's memory on one thread; read and written bytes both count."""
    # Ones, because pages of zeros that were never written all share one physical page.
    source, target = np.ones(HOST_BYTES, np.uint8), np.empty(HOST_BYTES, np.uint8)
    return 2 * HOST_BYTES / _best_s(lambda: np.copyto(target, source))


def matmul_flops_per_s(dtype: mx.Dtype) -> float:
    """Measure the multiplications and additions a second of a large square product of random numbers."""
    best = 0.0
    for side in SIDES:
        # Not zeros: they draw less power, which lets a GPU raise its clock.
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
    """Return the shortest time of several rounds, after one warm-up round."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])
