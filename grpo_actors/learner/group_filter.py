"""What a group is worth: its rewards as an array, its length penalties, and whether there is something to learn.

Knows groups and the maths of rewards; refuses to know the policy, and what becomes of a group.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from grpo_actors.config import Config
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.objective.advantages import compute_advantages
from grpo_actors.objective.shaping import overlong_penalty
from grpo_actors.schedule.group_criteria import FilterResult, GroupCriteria
from grpo_actors.tasks.task import Task

Array = np.ndarray[Any, np.dtype[np.float64]]


def rewards_of(group: SampledGroup, config: Config) -> Array:
    """[G, K], NaN where a reward function gave none."""
    return np.array(
        [
            [np.nan if (value := c.rewards.get(name)) is None else value for name in config.reward.functions]
            for c in group.completions
        ],
        dtype=np.float64,
    )


def penalties_of(group: SampledGroup, config: Config) -> Array:
    """[G] in [−1, 0], for completions near the limit, which bounds inserted tokens too; 0 with overlong_tokens = 0."""
    return overlong_penalty(
        np.array([len(completion.tokens) for completion in group.completions]),
        max_new_tokens=config.rollout.max_new_tokens,
        overlong_tokens=config.objective.overlong_tokens,
    )


def has_signal(group: SampledGroup, config: Config) -> bool:
    """Whether any completion that is in the loss has an advantage other than 0, under the run's own advantage."""
    (advantages,) = compute_advantages(
        config.objective.advantage,
        [rewards_of(group, config)],
        list(config.reward.functions.values()),
        penalties=[penalties_of(group, config)],
    )
    in_loss = [c.finished or not config.objective.mask_truncated for c in group.completions]
    return bool(np.any(advantages.values[in_loss]))


def group_filter(config: Config, task: Task) -> Callable[[SampledGroup], FilterResult] | None:
    """What tells the schedule about a group; None where section [selection] asks for nothing."""
    selection = config.selection
    if not (selection.replaces_groups or selection.curriculum):
        return None
    criteria = GroupCriteria(selection.dynamic_sampling, selection.min_success, selection.max_success)

    def filter_group(group: SampledGroup) -> FilterResult:
        right = [task.is_correct(c.answer, group.problem) for c in group.completions]
        return criteria.filter_group(sum(right) / len(right), signal=has_signal(group, config))

    return filter_group
