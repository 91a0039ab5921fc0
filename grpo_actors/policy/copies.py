"""How large a copy of weights may be that makes sampling faster. Loads no MLX: who plans memory asks too."""

#: A copy may take one part in so many of a device's memory. Where it would take more, the weights are so large that to
#: read them is what a step takes, and not to call kernels.
MEMORY_PARTS = 8


def may_copy(size: float, memory: float) -> bool:
    """Whether so many bytes may be copied on a device with so many."""
    return size <= memory / MEMORY_PARTS
