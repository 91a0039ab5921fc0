"""The size limit of weight copies that make sampling faster. Loads no MLX: memory planning uses it too."""

#: A copy may take at most 1 / MEMORY_PARTS of a device's memory. A larger copy would not pay: with weights of that
#: size, a step spends its time on reading them, not on launching kernels.
MEMORY_PARTS = 8


def may_copy(size: float, memory: float) -> bool:
    """Return whether weights of `size` bytes may be copied on a device with `memory` bytes."""
    return size <= memory / MEMORY_PARTS
