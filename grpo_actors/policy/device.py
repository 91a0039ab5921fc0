"""The device that MLX computes on, and its memory."""

import os

import mlx.core as mx


def on_cuda() -> bool:
    """Return whether MLX's default device is an NVIDIA GPU, and available."""
    return mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu


def memory_bytes() -> int:
    """Return the memory of the device that computes, or the host's where MLX does not report it."""
    info = mx.device_info()
    known = info.get("memory_size") or info.get("total_memory")  # Metal's key, and CUDA's
    return int(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
