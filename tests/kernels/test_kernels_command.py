"""The command that compiles kernels ahead: a line for each part, and an exit code that says whether all are there."""

import sys
from pathlib import Path

import pytest
from stand_in import write_kernel

from grpo_actors import backend
from grpo_actors.config import Config
from grpo_actors.errors import ConfigError, RunError
from grpo_actors.kernels.__main__ import main
from grpo_actors.kernels.stage import Stage, parts_of

BUILD = "mlx_cuda_13-0.32.4"
COMMAND = ["--config", "smoke_test", "--set", "eval_every_updates=10"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a kernel, on a machine with MLX for CUDA whose Python runs the stand-in for each part."""
    folder, python = tmp_path / "cache", tmp_path / "python"
    write_kernel(folder, "Known")
    stand_in = Path(__file__).with_name("stand_in.py")
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -S "{stand_in}" "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(backend, "cuda_build", lambda: BUILD)
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder))
    return folder


def test_each_part_has_a_line_and_one_that_failed_makes_the_exit_code_1(cache, capsys):
    assert main([*COMMAND, "--verbose"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line for line in lines if line.startswith(" ")) == ["    Add", "    Multiply/Exp"]
    parts = [line for line in lines if not line.startswith(" ")]
    assert sorted(line.split()[0] for line in parts) == sorted(parts_of(Config()))
    [failed] = [line for line in parts if "failed" in line]
    assert failed.split()[0] == "head"
    assert failed.endswith(" 0 kernels, failed: ModelError: too exotic")
    [marker] = cache.glob("*.done")
    marker.write_text("")  # as if none had failed
    assert main(COMMAND) == 0
    assert capsys.readouterr().out == f"{cache}: done before for these settings\n"


def test_without_cuda_or_a_place_to_write_it_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(cache / "Known.ptx"))
    with pytest.raises(RunError, match=r"Known\.ptx: cannot be written \("):
        main(COMMAND)
    monkeypatch.setattr(backend, "cuda_build", lambda: None)
    with pytest.raises(ConfigError, match="there are no kernels to compile"):
        main(COMMAND)


def test_a_stage_compiles_on_the_device_that_was_chosen(cache):
    found = Stage.find(Config(), BUILD, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert found is not None
    assert found.environment == {"CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert Stage.find(Config(), BUILD).environment == {}
