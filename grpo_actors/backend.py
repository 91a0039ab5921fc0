"""Prepare a process before ``mlx.core`` or transformers is first imported, or first used.

MLX's Linux CPU wheel is linked to a reference BLAS: 2 to 6 GFLOP/s in float32 on two cores. If OpenBLAS
symbols are already in the process when ``libmlx.so`` is loaded, they replace it: 160 to 200 GFLOP/s, with
no change to MLX. Importing the package calls `load_fast_blas`, so that it runs first in any order of
imports within the package.
"""

import ctypes
import functools
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

#: Where the NVIDIA driver describes each GPU that this machine or container sees.
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")

#: Environment variable: folder with the kernels that MLX has compiled for CUDA (`kernels.files`).
KERNELS = "MLX_PTX_CACHE_DIR"
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


def keep_kernels(gpus: Path = _NVIDIA_GPUS) -> None:
    """Keep the kernels that MLX compiles on a CUDA machine in the user's cache folder; a set MLX_PTX_CACHE_DIR stays.

    MLX compiles each kernel at its first use, for seconds, and keeps it in the temporary folder, which a reboot empties.
    The files hold code for one GPU and are found by the kernel's name alone, so each build of MLX and each model of GPU has
    its own folder. On a machine with several models MLX's default stays: which of them is used is not known here.
    """
    if os.environ.get(KERNELS):
        return
    try:
        models = _gpu_models(gpus)
        build = cuda_build() if len(models) == 1 else None
        if build is None:
            return
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "grpo_actors" / "kernels" / re.sub(r"[^\w.]+", "-", f"{build} {models.pop()}")
        # Not left to MLX: it works without a cache if another process makes the folder at the same moment.
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished_kernels(folder)
    except (OSError, RuntimeError):
        return  # no home folder, or none that can be written: MLX's default is as good
    os.environ[KERNELS] = str(folder)


def _gpu_models(gpus: Path) -> set[str]:
    """Return the names of the models in the driver's descriptions, as ``NVIDIA H200``."""
    lines = [line for file in gpus.glob("*/information") for line in file.read_text().splitlines()]
    return {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}


def cuda_build() -> str | None:
    """Return distribution and version of the installed MLX for CUDA, as ``mlx_cuda_13-0.32.4``; None without it."""
    spec = importlib.util.find_spec("mlx")
    sites = [Path(place).parent for place in (spec.submodule_search_locations or ())] if spec else []
    return next((found.stem for site in sites for found in site.glob("mlx_cuda*.dist-info")), None)


def _remove_unfinished_kernels(folder: Path) -> None:
    """Remove what a killed process or a full disk left: MLX would fail on it each time, and a reboot keeps this folder.

    MLX writes a kernel as NAME.ptx, NAME.txt, NAME.cu, in this order; a long name has folders. Removing one that another
    process is writing just now costs a compilation, no more.
    """
    for code in folder.rglob("*.ptx"):
        source = code.with_suffix(".cu")
        if not source.exists() or not source.stat().st_size:
            code.unlink(missing_ok=True)


class _TransformersFinder(MetaPathFinder):
    """Finds transformers as the other finders do, and has it loaded without PyTorch and by shorter ways."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "transformers" and "torch" not in sys.modules:
            loader_type: type[_LoaderInDisguise] = _LoaderWithoutTorch
        elif name == "transformers.utils.import_utils":
            loader_type = _LoaderOfShortScan
        else:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = loader_type(spec.loader)
        return spec


class _LoaderInDisguise(Loader):
    """Runs a module's code by its own loader, which takes its place in the module before."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)


class _LoaderWithoutTorch(_LoaderInDisguise):
    """Runs a package's code while PyTorch cannot be imported."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules["torch"] = None  # type: ignore[assignment] # Python's own mark: find and import nothing
        try:
            super().exec_module(module)
        finally:
            del sys.modules["torch"]


class _LoaderOfShortScan(_LoaderInDisguise):
    """Shortens transformers' search for what its 1,700 model files define.

    The search reads each file twice, because its cache of 128 folders is smaller than the 550 folders of models; and of each file
    it looks at all lines, although only those from the last ``__all__`` on matter. The result is the same. A
    version that searches in other ways keeps them.
    """

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        names = ("create_import_structure_from_path", "fetch__all__")
        if not all(callable(getattr(module, name, None)) for name in names):
            return
        list_folder, list_names = (getattr(module, name) for name in names)
        list_once = functools.cache(list_folder)

        def list_folder_once(path: str | os.PathLike[str]) -> Any:
            path = Path(path)
            return list_once(str(path.parent if path.is_file() else path))

        def list_names_at_end(source: str) -> Any:
            return list_names(source[source.rfind("\n__all__") + 1 :])

        for name, function in zip(names, (list_folder_once, list_names_at_end), strict=True):
            setattr(module, name, function)


_FINDER = _TransformersFinder()


def keep_torch_out_of_transformers() -> None:
    """Make transformers, which is not imported yet, do without PyTorch in this process.

    mlx-lm needs its tokenizers only, and they need no PyTorch. But where it is installed, transformers imports most of it:
    20 s in every process. No setting of transformers 5 prevents this. It looks for PyTorch while its own package is imported,
    and remembers the answer, so PyTorch seems absent for just that moment: ``import torch``, by a model folder's
    own tokenizer or by a library, works before and after.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def let_torch_into_transformers() -> None:
    """Take `keep_torch_out_of_transformers` back: the process runs a user's code, which may use transformers' models."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


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
