"""Prepare a process before ``mlx.core`` is first imported, or first used.

MLX's Linux CPU wheel is linked to a reference BLAS: 2 to 6 GFLOP/s in float32 on two cores. If OpenBLAS
symbols are already in the process when ``libmlx.so`` is loaded, they replace it: 160 to 200 GFLOP/s, with
no change to MLX. Importing the package calls `load_fast_blas`, so that it runs first in any order of
imports within the package.
"""

import ctypes
import importlib.util
import os
import sys
import warnings
from pathlib import Path

#: Environment variable: folder with the sockets of CUDA MPS, by which processes share a GPU instead of taking turns.
MPS_FOLDER = "CUDA_MPS_PIPE_DIRECTORY"


def load_fast_blas() -> None:
    """Load OpenBLAS before MLX's own BLAS; do nothing except on Linux x86-64, or if CUDA is installed.

    The number of threads is the environment's ``OPENBLAS_NUM_THREADS``, read when the library loads:
    the supervisor sets it for each process.
    """
    if sys.platform != "linux":
        return
    folder = _package_folder("ngsolve_openblas")
    mlx_libraries = _package_folder("mlx_cpu.libs")
    if folder is None or mlx_libraries is None:
        return
    if "mlx.core" in sys.modules:
        _warn("mlx.core was imported before grpo_actors; import grpo_actors first")
        return
    library = next(folder.glob("libopenblas*.so"))
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError:
        _link_fortran_runtime(folder, mlx_libraries)
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            _warn(f"{error}; install your system's libgfortran5 package")


def allow_varying_shapes() -> None:
    """Allow batches of ever new shapes on CUDA.

    MLX caches a plan for each shape of its attention, and a graph for each sequence of kernels. It ends a process that
    has needed twice as many as the cache holds with an error, although new plans only cost time. For a backward pass
    that happens after about 128 shapes in the life of a learner. MLX reads these variables at its first use of the device.
    """
    os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")
    os.environ.setdefault("MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE", "256")


def submit_long_graphs() -> None:
    """Submit a whole decoding step to a CUDA device at once, instead of 20 kernels at a time.

    Saves a fifth of a step (Qwen2.5-0.5B on an H100: 9.8 → 7.8 ms). Only for processes that sample and do not train: a
    graph's buffers are held until all of it has run, which in a backward pass would be all activations. MLX reads both
    variables at its first use of the device; values that are already set stay. Not on a Mac, where they bound a Metal
    command buffer: a long one blocks the display.
    """
    if sys.platform == "darwin":
        return
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "1000")
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "4000")


def join_mps(folder: str) -> None:
    """Let this process share its GPU with those of a run; `folder` is the run's ``CUDA_MPS_PIPE_DIRECTORY``, or empty.

    CUDA reads the variable at its first use. A value that is already set stays. In a folder where nobody listens CUDA
    works without MPS.
    """
    if folder:
        os.environ.setdefault(MPS_FOLDER, folder)


def _warn(why: str) -> None:
    warnings.warn(
        f"no OpenBLAS in this process, so MLX runs about 80 times slower on this CPU: {why}",
        RuntimeWarning,
        stacklevel=3,
    )


def _link_fortran_runtime(folder: Path, mlx_libraries: Path) -> None:
    """Link the libgfortran in MLX's own wheel to the place where OpenBLAS looks for it.

    A machine without a Fortran compiler has no libgfortran, and the wheel's copy has a mangled name.
    OpenBLAS looks in its own folder ($ORIGIN), so one symbolic link there is enough. Two processes may
    race here: the second finds the link already made.
    """
    for quadmath in mlx_libraries.glob("libquadmath*"):
        ctypes.CDLL(str(quadmath))
    link = folder / "libgfortran.so.5"
    fortran = next(mlx_libraries.glob("libgfortran*.so.5*"), None)
    if fortran is not None and os.access(folder, os.W_OK):
        try:
            link.symlink_to(os.path.relpath(fortran, folder))
        except FileExistsError:
            return


def _package_folder(name: str) -> Path | None:
    """Find folder `name` in the site directory that contains MLX, without importing anything; None if absent."""
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        folder = Path(location).parent / name
        if folder.is_dir():
            return folder
    return None
