"""The settings of a run: one frozen `Config`, read from TOML files and ``--set``."""

from grpo_actors.config.schema import (
    OWNER,
    SECTIONS,
    Config,
    DataConfig,
    EvaluatorConfig,
    LearnerConfig,
    MetricsConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TransportConfig,
)

__all__ = [
    "OWNER",
    "SECTIONS",
    "Config",
    "DataConfig",
    "EvaluatorConfig",
    "LearnerConfig",
    "MetricsConfig",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TransportConfig",
]
