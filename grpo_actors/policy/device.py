"""Which device MLX computes on."""

import mlx.core as mx


def on_cuda() -> bool:
    """Whether it is an NVIDIA GPU: there, and the default."""
    return mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu
