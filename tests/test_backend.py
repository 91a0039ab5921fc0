"""A process of ours prepares itself before MLX and transformers are imported: seen from real processes."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_actors import backend
from grpo_actors.backend import allow_varying_shapes, submit_long_graphs
from grpo_actors.config import Config
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.tasks.task import Problem

ROOT = Path(__file__).parents[1]

#: All that the three actors import, also what they import late.
ACTORS = """
import importlib.util, sys
assert importlib.util.find_spec("transformers")  # as libraries do that only ask
import grpo_actors.rollout.episodes, grpo_actors.rollout.joining, grpo_actors.rollout.worker
import grpo_actors.learner.opening, grpo_actors.evaluator.following, grpo_actors.evaluator.comparison.compare
from grpo_actors.policy.model import load_policy
from grpo_actors.config import ModelConfig
load_policy(ModelConfig(), seed=0)
assert "transformers" in sys.modules
print("torch" in sys.modules)
import torch
print(torch.__version__)
"""

#: Counts how often transformers' model files are opened as text, then lists again what they define, by its own functions.
SCAN = """
import collections, importlib.util, sys
opened = collections.Counter()
sys.addaudithook(lambda event, data: event == "open" and data[1] == "r" and opened.update([data[0]]))
import mlx_lm
from transformers.utils import import_utils as ours
models = str(importlib.util.find_spec("transformers").submodule_search_locations[0]) + "/models"
files = {name: times for name, times in opened.items() if str(name).startswith(models)}
print(len(files) > 500, max(files.values()))
spec = importlib.util.spec_from_file_location("transformers.utils.unchanged", ours.__file__)
unchanged = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unchanged)
print(unchanged.fetch__all__ is not ours.fetch__all__)
print(unchanged.define_import_structure(models) == ours.define_import_structure(models))
"""


@pytest.fixture
def torch_folder(tmp_path):
    """A folder with a stand-in for PyTorch that looks installed, and lacks all that transformers would ask it for."""
    folder = tmp_path / "site"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text('__version__ = "2.11.0"\n')
    (folder / "torch-2.11.0.dist-info").mkdir()
    (folder / "torch-2.11.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.11.0\n")
    return folder


def run(arguments, folder, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_no_actor_imports_torch_and_an_import_by_the_user_still_works(torch_folder):
    (torch_folder / "probe.py").write_text(ACTORS)
    printed = run(["-m", "grpo_actors.supervisor.entry", "probe"], torch_folder)
    assert printed == ["False", "2.11.0"]


def test_transformers_reads_each_model_file_once_and_finds_the_same(tmp_path):
    (tmp_path / "probe.py").write_text(SCAN)
    printed = run(["-m", "grpo_actors.supervisor.entry", "probe"], tmp_path)
    assert printed == ["True", "1", "True", "True"]


def test_a_transformers_that_searches_in_another_way_is_left_as_it_is(tmp_path):
    utils = tmp_path / "transformers" / "utils"
    utils.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text(
        "from transformers.utils.import_utils import fetch__all__"
    )
    (utils / "__init__.py").touch()
    (utils / "import_utils.py").write_text("def fetch__all__(lines): return len(lines)")
    (tmp_path / "probe.py").write_text("import transformers\nprint(transformers.fetch__all__(['a', 'b']))")
    assert run(["-m", "grpo_actors.supervisor.entry", "probe"], tmp_path) == ["2"]


def test_a_users_reward_gets_transformers_with_torch(torch_folder, tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    # What transformers asks before it imports torch; a whole import would need more than the stand-in.
    file.write_text(
        "import importlib.util, sys\n"
        "hidden = [finder for finder in sys.meta_path if 'grpo_actors' in type(finder).__module__]\n"
        "def torch_is_visible(completions, **columns):\n"
        "    found = not hidden and importlib.util.find_spec('torch') is not None\n"
        "    return [float(found)] * len(completions)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(torch_folder))
    problem = Problem(id="1", messages=({"role": "user", "content": "?"},), answer="", columns={})
    name = f"{file}:torch_is_visible"
    with open_scorer(Config.model_validate({"reward": {"functions": {name: 1.0}}})) as scorer:
        assert scorer.score(problem, ["a"]).rewards == {name: [1.0]}


@pytest.fixture
def blas_of(tmp_path):
    """A function that makes an environment with these files in OpenBLAS's folder and in that of MLX's libraries, imports
    the package there, and returns what it says.
    """
    site = tmp_path / "site"
    (site / "mlx").mkdir(parents=True)
    (site / "mlx" / "__init__.py").touch()
    (site / "mlx" / "core.py").touch()

    def said(openblas, libraries, before=""):
        for folder, files in (("ngsolve_openblas", openblas), ("mlx_cpu.libs", libraries)):
            if files is not None:
                (site / folder).mkdir(exist_ok=True)
            for name in files or ():
                (site / folder / name).write_text("no library")
        code = f"{before}\nimport grpo_actors"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stderr

    return said


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has a fast BLAS of its own")
def test_a_process_without_openblas_says_why_and_names_the_cure(blas_of, tmp_path):
    assert blas_of(None, None) == blas_of(None, []) == "", "an MLX without this BLAS has another"
    too_late = blas_of([], ["libgfortran-1a.so.5.0.0"], before="import mlx.core").splitlines()[0]
    # In the name of the package: a command hides the warnings of others.
    assert Path(too_late.partition(":")[0]) == ROOT / "grpo_actors" / "__init__.py"
    assert too_late.endswith(
        "RuntimeWarning: no OpenBLAS in this process, so MLX runs about 80 times slower on this CPU: "
        "mlx.core was imported before grpo_actors; import grpo_actors first"
    )
    # OpenBLAS looks for a libgfortran in its own folder, and MLX's wheel has one. Here both are no libraries.
    cure = "install your system's libgfortran5 package"
    assert cure in blas_of(["libopenblas.so"], ["libgfortran-1a.so.5.0.0"])
    link = tmp_path / "site" / "ngsolve_openblas" / "libgfortran.so.5"
    assert link.readlink() == Path("../mlx_cpu.libs/libgfortran-1a.so.5.0.0")
    assert cure in blas_of([], []), "the link is there"
    (tmp_path / "site" / "mlx_cpu.libs" / "libgfortran-1a.so.5.0.0").unlink()
    link.unlink()
    assert cure in blas_of([], []), "there is nothing to link"


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has a fast BLAS of its own")
def test_the_fortran_runtime_has_what_it_needs_before_it_is_looked_for(blas_of, tmp_path):
    mlx = Path(importlib.util.find_spec("mlx").submodule_search_locations[0])
    library = next(mlx.parent.glob("mlx_cpu.libs/libquadmath*"), None)
    if library is None:
        pytest.skip("MLX for CUDA comes without it")
    blas_of(["libopenblas.so"], [])
    shutil.copy(library, tmp_path / "site" / "mlx_cpu.libs" / "libquadmath-copy.so.0")
    loaded = (
        "import atexit, sys\natexit.register(lambda: print(open('/proc/self/maps').read(), file=sys.stderr))"
    )
    assert "libquadmath-copy.so.0" in blas_of([], [], before=loaded)


def test_an_mlx_that_is_no_folder_has_no_libraries(tmp_path):
    (tmp_path / "mlx.py").touch()
    assert run(["-c", "import grpo_actors.backend as b; print(b.cuda_build())"], tmp_path) == ["None"]


def test_what_bounds_mlx_on_cuda_is_set_unless_the_user_has_set_it(monkeypatch):
    shapes = {"MLX_ENABLE_CACHE_THRASHING_CHECK", "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE"}
    graphs = {"MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"}
    for function, names in ((allow_varying_shapes, shapes), (submit_long_graphs, graphs)):
        for name in names:
            monkeypatch.setenv(name, "restored after the test")
            monkeypatch.delenv(name)
        monkeypatch.setattr(sys, "platform", "linux")
        function()
        assert names <= os.environ.keys()
        for name in names:
            monkeypatch.setenv(name, "mine")
        function()
        assert {os.environ[name] for name in names} == {"mine"}
    for name in graphs:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "darwin")
    submit_long_graphs()
    assert graphs.isdisjoint(os.environ), "a long graph blocks a Mac's display"


def test_transformers_that_is_not_installed_is_not_found(monkeypatch):
    finder = backend._TransformersFinder()
    monkeypatch.setattr(sys, "meta_path", [finder])
    assert finder.find_spec("transformers.utils.import_utils") is None


#: Prints the folder of kernels. Importing the package has set that of the real machine, if it has a GPU.
KERNELS = """
import os
from pathlib import Path
from grpo_actors.backend import keep_kernels
os.environ["MLX_PTX_CACHE_DIR"] = {chosen!r}
keep_kernels(Path({gpus!r}))
print(os.environ["MLX_PTX_CACHE_DIR"] or None)
"""


@pytest.fixture
def kernels_of(tmp_path):
    """A function that makes a machine with these GPUs and MLX for CUDA, and returns the folder for kernels there."""
    site = tmp_path / "site"
    for name in ("mlx", "mlx_cuda_13-0.32.4.dist-info"):
        (site / name).mkdir(parents=True)
    (site / "mlx" / "__init__.py").touch()

    def kernels(*models, chosen="", cache=tmp_path / "cache"):
        gpus = tmp_path / "-".join(("gpus", *models))
        for number, model in enumerate(models):
            (gpus / f"0000:{number:02}").mkdir(parents=True, exist_ok=True)
            (gpus / f"0000:{number:02}" / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
        code = KERNELS.format(gpus=str(gpus), chosen=chosen)
        [folder] = run(["-c", code], site, XDG_CACHE_HOME=str(cache))
        return folder

    return kernels


def test_kernels_are_kept_for_each_build_of_mlx_and_each_model_of_gpu(kernels_of, tmp_path):
    kept = tmp_path / "cache" / "grpo_actors" / "kernels"
    assert kernels_of("NVIDIA H200", "NVIDIA H200") == str(kept / "mlx_cuda_13-0.32.4-NVIDIA-H200")
    assert kernels_of("Tesla V100/16") == str(kept / "mlx_cuda_13-0.32.4-Tesla-V100-16")


def test_kernels_stay_where_the_user_wants_them_or_where_mlx_puts_them(kernels_of, tmp_path):
    assert kernels_of("NVIDIA H200", chosen="/mine") == "/mine"
    assert kernels_of("NVIDIA H200", "NVIDIA L4") == "None"  # which of the two is used is not known
    assert kernels_of() == "None"
    (tmp_path / "file").touch()
    assert kernels_of("NVIDIA H200", cache=tmp_path / "file") == "None"


def test_a_kernel_that_a_killed_process_left_unfinished_is_removed(kernels_of):
    folder = Path(kernels_of("NVIDIA H200"))
    (folder / "long").mkdir()
    for name in ("whole.ptx", "whole.cu", "half.ptx", "half.txt", "long/half.ptx", "full_disk.ptx"):
        (folder / name).write_text("code")
    (folder / "full_disk.cu").touch()
    assert kernels_of("NVIDIA H200") == str(folder)
    assert [file.name for file in folder.rglob("*.ptx")] == ["whole.ptx"]
