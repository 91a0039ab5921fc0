"""The settings of a run: one frozen `Config`, read from TOML files and ``--set``."""

from grpo_actors.config.data import DataConfig, RewardConfig
from grpo_actors.config.load import LoadedConfig, load_config, read_config
from grpo_actors.config.objective import ObjectiveConfig
from grpo_actors.config.resume import MATTERS_FOR_RESUME, differences, resume_conflicts
from grpo_actors.config.schema import (
    OWNER,
    SECTIONS,
    Config,
    EvaluatorConfig,
    LearnerConfig,
    MetricsConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SelectionConfig,
    TransportConfig,
)
from grpo_actors.config.thresholds import HealthConfig

__all__ = [
    "MATTERS_FOR_RESUME",
    "OWNER",
    "SECTIONS",
    "Config",
    "DataConfig",
    "EvaluatorConfig",
    "HealthConfig",
    "LearnerConfig",
    "LoadedConfig",
    "MetricsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SelectionConfig",
    "TransportConfig",
    "differences",
    "load_config",
    "read_config",
    "resume_conflicts",
]
