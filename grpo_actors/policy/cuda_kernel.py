"""Our own CUDA kernels, which MLX compiles from source at their first call.

Depends on names and caches only, not on what a kernel computes.
"""

import hashlib
from functools import lru_cache
from typing import Any

import mlx.core as mx


@lru_cache(maxsize=16)
def cuda_kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Any:
    """Return a kernel, called like `mx.fast.cuda_kernel`'s; its template must name every type that it computes with."""
    # MLX caches compiled kernels on disk under their name alone. Without the digest of the source in the name, a run
    # would load the kernel of an earlier version of this program.
    digest = hashlib.sha256("\n".join((*inputs, *outputs, source)).encode()).hexdigest()[:12]
    return mx.fast.cuda_kernel(
        name=f"{name}_{digest}", input_names=list(inputs), output_names=list(outputs), source=source
    )
