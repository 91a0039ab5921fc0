"""Fixtures of all tests: policies from the embedded model, a run folder, measured figures. Loads the BLAS that must come
before MLX.
"""

import functools
import importlib.util
import os
import signal
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# Set before the BLAS loads. Its threads wait by spinning: on two busy cores a second thread makes the products of these
# small models four times slower. Runs that tests start divide the cores themselves.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Set before MLX first uses a GPU: with it, float32 products have float32 precision there too, as the tests require.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# Files that tests write and read as data sets leave nothing in the user's cache.
os.environ.setdefault(
    "HF_DATASETS_CACHE", str(Path(tempfile.gettempdir()) / "grpo-actors-tests" / "datasets")
)
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Before a GPU's first kernel is compiled. A kernel's file is found by its name alone, and another process may read it
    # before it is whole: each process that runs tests has a folder of its own, also for the runs that it starts.
    kernels = Path(tempfile.gettempdir()) / "grpo-actors-tests" / f"mlx-{version('mlx')}" / worker
    kernels.mkdir(parents=True, exist_ok=True)
    os.environ["MLX_PTX_CACHE_DIR"] = str(kernels)

import pytest

from grpo_actors.backend import keep_torch_out_of_transformers

# As every command does: transformers is imported in half the time. Where there is PyTorch, some tests compare with it.
if importlib.util.find_spec("torch") is None:
    keep_torch_out_of_transformers()

import grpo_actors.policy  # noqa: F401 - before any test module imports mlx.core
from grpo_actors.config import ModelConfig
from grpo_actors.policy.model import Policy, load_policy

# A shell's background job, and one under nohup, ignores these, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def tiny() -> Policy:
    """The embedded model, fresh for each test, in float32."""
    return load_policy(ModelConfig(dtype="float32"), seed=0)


@pytest.fixture
def tiny_lora() -> Policy:
    """The embedded model with a new adapter of rank 4."""
    return load_policy(ModelConfig(dtype="float32", fine_tune_type="lora", lora_rank=4), seed=0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An empty run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


#: Under this name a test's report carries what it has measured.
FIGURES = "figures"


@pytest.fixture
def note_figures(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Note what a test has measured; printed at the end, also where several processes run the tests."""
    return functools.partial(record_property, FIGURES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])
    ]
    figures = [
        text
        for report in reports
        if report.when == "call"
        for name, text in report.user_properties
        if name == FIGURES
    ]
    if figures:
        terminalreporter.section(FIGURES)
    for text in figures:
        terminalreporter.write_line(text)
