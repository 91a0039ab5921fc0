"""NVIDIA's runtime compiler, which MLX has loaded: CUDA source in, machine code of one GPU out."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

#: Where Linux lists the files that a process has mapped; the last column is a path.
_MAPS = Path("/proc/self/maps")


def compile_source(source: str, name: str, architecture: str) -> bytes:
    """Compile CUDA C++ that includes no header, and return its machine code (cubin).

    Args:
        source: The source.
        name: Its name in messages.
        architecture: The GPU's, as ``sm_90``.

    Raises:
        OSError: The compiler is not there, or refuses the source; with its log.
    """
    nvrtc, program = _library(), ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
    )
    _check("nvrtcCreateProgram", created)
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            raise OSError(f"{name}: {_result('ProgramLog', program).rstrip(bytes(1)).decode()}")
        return _result("CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _result(what: str, program: ctypes.c_void_p) -> bytes:
    """Return one of a program's results; the compiler first tells its size, then copies it."""
    nvrtc, size = _library(), ctypes.c_size_t()
    _check(f"nvrtcGet{what}Size", getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(f"nvrtcGet{what}", getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return data.raw


def _check(call: str, code: int) -> None:
    if code:
        raise OSError(f"{call}: NVRTC's error {code}")


@lru_cache(maxsize=1)
def _library() -> Any:
    """Open the compiler that MLX is linked to, wherever it was installed."""
    mapped = {line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines()}
    paths = [path for path in mapped if Path(path).name.startswith("libnvrtc.so")]
    if not paths:
        raise OSError("MLX has loaded no libnvrtc.so")
    return ctypes.CDLL(paths[0])
