"""What must be so before ``mlx.core`` is first imported, or first used.

MLX's Linux CPU wheel is linked to a reference BLAS: 2 to 6 GFLOP/s in float32 on two cores. An
OpenBLAS whose symbols are already in the process when ``libmlx.so`` is loaded takes its place:
160 to 200 GFLOP/s, with no change to MLX. Importing the package calls `load_fast_blas`, so that no
order of imports within it can miss the moment.
"""

import ctypes
import importlib.util
import os
import sys
import warnings
from pathlib import Path


def load_fast_blas() -> None:
    """Put OpenBLAS before MLX's own BLAS; does nothing off Linux x86-64 or where CUDA is installed.

    The number of threads is the environment's ``OPENBLAS_NUM_THREADS``, read when the library loads:
    the supervisor sets it for each process.
    """
    if sys.platform != "linux":
        return
    home = _package_folder("ngsolve_openblas")
    mlx_libraries = _package_folder("mlx_cpu.libs")
    if home is None or mlx_libraries is None:
        return
    if "mlx.core" in sys.modules:
        _warn("mlx.core was imported before grpo_actors; import grpo_actors first")
        return
    library = next(home.glob("libopenblas*.so"))
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError:
        _lend_fortran_runtime(home, mlx_libraries)
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            _warn(f"{error}; install your system's libgfortran5 package")


def let_shapes_vary() -> None:
    """On CUDA, keep a run alive whose batches have ever new shapes.

    MLX keeps a plan for each shape of its attention, and a graph for each sequence of kernels. A process that has
    needed twice as many as it keeps is ended with an error, though nothing is wrong with it but the time that a plan
    takes: some 128 shapes of a backward pass in the life of a learner. MLX reads this when it first uses the device.
    """
    os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")
    os.environ.setdefault("MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE", "256")


def submit_long_graphs() -> None:
    """On CUDA, hand a step of decoding to the device at once instead of 20 kernels at a time.

    Saves a fifth of a step (Qwen2.5-0.5B on an H100: 9.8 → 7.8 ms). For processes that sample and do not train: what a
    graph needs is held until all of it has run, which for a backward pass would be all of its activations. MLX
    reads both when it first uses the device; who has set them knows better. Not on a Mac, where they bound a Metal command
    buffer: a long one holds up the display.
    """
    if sys.platform == "darwin":
        return
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "1000")
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "4000")


def _warn(why: str) -> None:
    warnings.warn(
        f"no OpenBLAS in this process, so MLX runs about 80 times slower on this CPU: {why}",
        RuntimeWarning,
        stacklevel=3,
    )


def _lend_fortran_runtime(home: Path, mlx_libraries: Path) -> None:
    """Let OpenBLAS find the libgfortran that MLX's own wheel carries.

    A machine without a Fortran compiler has none, and the wheel's copy has a mangled name. OpenBLAS
    looks beside itself ($ORIGIN), so one symbolic link there is enough. Two processes may race here:
    whoever comes second finds the link made.
    """
    for quadmath in mlx_libraries.glob("libquadmath*"):
        ctypes.CDLL(str(quadmath))
    link = home / "libgfortran.so.5"
    fortran = next(mlx_libraries.glob("libgfortran*.so.5*"), None)
    if fortran is not None and os.access(home, os.W_OK):
        try:
            link.symlink_to(os.path.relpath(fortran, home))
        except FileExistsError:
            return


def _package_folder(name: str) -> Path | None:
    """Folder `name` in the site directory that holds MLX; found without importing anything."""
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        folder = Path(location).parent / name
        if folder.is_dir():
            return folder
    return None
