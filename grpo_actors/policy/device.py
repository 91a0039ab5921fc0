"""Which device MLX computes on, and its memory."""

import os

import mlx.core as mx


def on_cuda() -> bool:
    """Whether it is an NVIDIA GPU: there, and the default."""
    return mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu


def memory_bytes() -> int:
    """Of the device that computes."""
    info = mx.device_info()
    known = info.get("memory_size") or info.get("total_memory")  # Metal's name for it, and CUDA's
    return int(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
