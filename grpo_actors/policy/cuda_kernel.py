"""Kernels of our own for CUDA, in the source that MLX compiles when one is first called.

Knows names and caches; refuses to know what is computed.
"""

import hashlib
from functools import lru_cache
from typing import Any

import mlx.core as mx


@lru_cache(maxsize=16)
def cuda_kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Any:
    """A kernel, to be called as `mx.fast.cuda_kernel` says; its template must name every type that it computes with."""
    # MLX keeps what it has compiled on disk, by the kernel's name alone: without its source in the name, a run would
    # take the kernel of an earlier version of this program.
    digest = hashlib.sha256("\n".join((*inputs, *outputs, source)).encode()).hexdigest()[:12]
    return mx.fast.cuda_kernel(
        name=f"{name}_{digest}", input_names=list(inputs), output_names=list(outputs), source=source
    )
