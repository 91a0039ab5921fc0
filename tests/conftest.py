"""Shared by all tests: the BLAS that must be loaded before MLX, and the policy that ships with the package."""

from pathlib import Path

import pytest

import grpo_actors.policy  # noqa: F401 - before any test module imports mlx.core
from grpo_actors.config import ModelConfig
from grpo_actors.policy.model import Policy, load_policy


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
