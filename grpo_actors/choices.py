"""What a run's settings choose from the menus: the objective, the rewards."""

from grpo_actors.config import Config
from grpo_actors.objective.objective import Objective
from grpo_actors.tasks.registry import chosen_rewards
from grpo_actors.tasks.task import Task


def with_rewards(config: Config, task: Task) -> Config:
    """The configuration with its rewards named: the task's own where it names none."""
    rewards = {"functions": chosen_rewards(config.reward.functions, task)}
    return config.model_copy(update={"reward": config.reward.model_copy(update=rewards)})


def objective(config: Config) -> Objective:
    """The menu's choice, from section [learner]."""
    learner = config.learner
    return Objective(
        advantage=learner.advantage,
        loss=learner.loss,
        aggregation=learner.aggregation,
        clip_eps=learner.clip_eps,
        clip_eps_high=learner.clip_eps_high,
        kl_coeff=learner.kl_coeff,
        mask_truncated=learner.mask_truncated,
        # A quantised worker is another policy than the learner's: its ratio would not start at 1.
        ratio="recomputed" if config.rollout.quantize_for_rollouts else "recorded",
        correction="token_truncate" if config.rollout.quantize_for_rollouts else "none",
    )
