"""The device that MLX computes on, and its memory."""

import mlx.core as mx

from grpo_actors import host
from grpo_actors.policy.cuda_driver import driver


def on_cuda() -> bool:
    """Return whether MLX's default device is an NVIDIA GPU, and available."""
    return mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu


def memory_bytes() -> int:
    """Return the memory of the device that computes, or the host's where MLX does not report it."""
    info = mx.device_info()
    known = info.get("memory_size") or info.get("total_memory")  # Metal's key, and CUDA's
    return int(known) if known else host.memory_bytes()


def return_unused_memory() -> None:
    """Return the memory of freed arrays to an NVIDIA GPU, for the other processes; do nothing elsewhere.

    MLX frees arrays on a stream that it never waits for, and the driver's pool keeps what nobody has seen to be free: for
    arrays of 25 GB it grew to 31 GB. Waits until everything that was submitted is done: for between two pieces of work.
    """
    if on_cuda():
        driver().synchronize()
