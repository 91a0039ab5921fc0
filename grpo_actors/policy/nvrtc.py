"""NVIDIA's runtime compiler, which MLX has loaded: CUDA source in, machine code of one GPU out."""

import ctypes
from functools import lru_cache

from grpo_actors.policy.shared_library import CudaError, check, open_loaded


def compile_source(source: str, name: str, architecture: str) -> bytes:
    """Compile CUDA C++ that includes no header, and return its machine code (cubin).

    Args:
        source: The source.
        name: Its name in messages.
        architecture: The GPU's, as ``sm_90``.

    Raises:
        CudaError: The compiler is not there, or refuses the source; with its log.
    """
    nvrtc, program = _library(), ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
    )
    check(created, "nvrtcCreateProgram", "NVRTC")
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            raise CudaError(f"{name}: {_result('ProgramLog', program).rstrip(bytes(1)).decode()}")
        return _result("CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _result(what: str, program: ctypes.c_void_p) -> bytes:
    """Return one of a program's results; the compiler first tells its size, then copies it."""
    nvrtc, size = _library(), ctypes.c_size_t()
    sized = getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    check(sized, f"nvrtcGet{what}Size", "NVRTC")
    data = ctypes.create_string_buffer(size.value)
    check(getattr(nvrtc, f"nvrtcGet{what}")(program, data), f"nvrtcGet{what}", "NVRTC")
    return data.raw


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return open_loaded("libnvrtc.so")
