"""CUDA's libraries that MLX has loaded, wherever they were installed."""

import ctypes
from pathlib import Path

#: Where Linux lists the files that a process has mapped; the last column is a path.
_MAPS = Path("/proc/self/maps")


class CudaError(OSError):
    """A part of CUDA is not there, or refuses what it is asked for."""


def check(code: int, call: str, library: str) -> None:
    """Raise `CudaError` if a call of one of CUDA's libraries returned a code other than 0."""
    if code:
        raise CudaError(f"{call}: {library}'s error {code}")


def open_loaded(name: str) -> ctypes.CDLL:
    """Open a library that this process has loaded, as ``libnvrtc.so``.

    Raises:
        CudaError: it has not.
    """
    mapped = {line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines()}
    paths = [path for path in mapped if Path(path).name.startswith(name)]
    if not paths:
        raise CudaError(f"MLX has loaded no {name}")
    return ctypes.CDLL(paths[0])
