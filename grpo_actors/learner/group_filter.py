"""The group filter: the rewards of a group as an array, its length penalties, and whether it has a signal.

Depends on groups and reward maths only, not on the policy. The lease table decides what happens to a filtered group.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from grpo_actors.config import Config
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.objective.advantages import compute_advantages
from grpo_actors.objective.shaping import overlong_penalty
from grpo_actors.schedule.group_criteria import FilterResult, GroupCriteria
from grpo_actors.tasks.task import Task

Array = np.ndarray[Any, np.dtype[np.float64]]


def rewards_of(group: SampledGroup, config: Config) -> Array:
    """Return the rewards, [G, K]: G completions, K functions; NaN where a function gave no valid reward."""
    return np.array(
        [
            [np.nan if (value := c.rewards.get(name)) is None else value for name in config.reward.functions]
            for c in group.completions
        ],
        dtype=np.float64,
    )


def penalties_of(group: SampledGroup, config: Config) -> Array:
    """Return the penalties [G], in [−1, 0], of completions near max_new_tokens; all 0 with overlong_tokens = 0.

    max_new_tokens bounds all tokens of a completion, so the environment's tokens count too.
    """
    return overlong_penalty(
        np.array([len(completion.tokens) for completion in group.completions]),
        max_new_tokens=config.rollout.max_new_tokens,
        overlong_tokens=config.objective.overlong_tokens,
    )


def has_signal(group: SampledGroup, config: Config) -> bool:
    """Return whether any completion in the loss has an advantage other than 0, with the run's advantage function."""
    (advantages,) = compute_advantages(
        config.objective.advantage,
        [rewards_of(group, config)],
        list(config.reward.functions.values()),
        penalties=[penalties_of(group, config)],
    )
    in_loss = [c.finished or not config.objective.mask_truncated for c in group.completions]
    return bool(np.any(advantages.values[in_loss]))


def group_filter(
    config: Config, task: Task, text_of: Callable[[SampledGroup, SampledCompletion], str]
) -> Callable[[SampledGroup], FilterResult] | None:
    """Return the function that filters a group for the schedule; None if section [selection] needs no filter.

    `text_of` returns the text of a completion that is judged.
    """
    selection = config.selection
    if not (selection.replaces_groups or selection.curriculum):
        return None
    criteria = GroupCriteria(selection.dynamic_sampling, selection.min_success, selection.max_success)

    def filter_group(group: SampledGroup) -> FilterResult:
        right = [task.is_correct(text_of(group, c), group.problem) for c in group.completions]
        return criteria.filter_group(sum(right) / len(right), signal=has_signal(group, config))

    return filter_group
