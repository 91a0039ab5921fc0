"""Compute advantages from rewards, in float64 on the host: how much better a completion was than its group.

Depends on rewards and groups only, not on tokens, masks and log-probs. Departures from the papers: a completion
without a valid reward is left out of every mean and deviation. Rewards that differ only by rounding give exactly
0, so that a group without a signal cannot move a weight.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: Added to a standard deviation before dividing by it (TRL's value).
STD_EPSILON = 1e-4
#: A larger absolute reward is an error of its function and counts as no reward: its square must stay finite
#: in float64, and its advantage in float32.
REWARD_LIMIT = 1e30


class Group(NamedTuple):
    """The n valid completions of one problem: n may be smaller than the number sampled, or 0."""

    rewards: Array  # [n] float64, weighted sum over the reward functions
    by_function: Array  # [n, K] float64, NaN where a function gave no reward
    weights: Array  # [K] float64


class Advantages(NamedTuple):
    """The advantages of one group of G completions."""

    values: Array  # [G] float32, 0 where invalid
    valid: Array  # [G] bool; an invalid completion is masked out of the loss
    rewards: Array  # [G] float64, weighted sum, NaN where invalid


def compute_advantages(
    name: str,
    groups: Sequence[Array],
    weights: Sequence[float] | Array,
    *,
    penalties: Sequence[Array] | None = None,
) -> list[Advantages]:
    """Return the advantages of all groups of one update.

    Args:
        name: A key of `ADVANTAGES`.
        groups: Rewards of each group, [G, K] for K reward functions; G may differ from group to group.
            NaN (or infinity) means that the function gave no valid reward.
        weights: [K]. A function of weight 0 is only logged: its value does not make a completion valid.
        penalties: For each group [G], such as `shaping.overlong_penalty`: a further reward function of
            weight 1, which does not make a completion valid by itself.

    Returns:
        One `Advantages` for each group, in the order given.

    Raises:
        KeyError: The name is not in the table.
        ValueError: A group is not [G, K], or a penalty not [G].
    """
    weights = np.asarray(weights, np.float64)
    columns = [_checked(rewards, weights) for rewards in groups]
    valid = [np.any(~np.isnan(r) & (weights != 0.0), axis=1) for r in columns]
    if penalties is not None:
        columns = [_with_penalty(r, p, v) for r, p, v in zip(columns, penalties, valid, strict=True)]
        weights = np.append(weights, 1.0)
    # NaN times a weight of 0 is NaN, which nansum leaves out as well.
    totals = [np.nansum(r * weights, axis=1) for r in columns]
    kept = [Group(t[v], r[v], weights) for t, r, v in zip(totals, columns, valid, strict=True)]
    values = ADVANTAGES[name](kept)
    return [_scattered(a, t, v) for a, t, v in zip(values, totals, valid, strict=True)]


def group_advantages(groups: Sequence[Group]) -> list[Array]:
    """Return (R − mean) / (std + 1e-4) in each group, with the sample deviation (n − 1). DeepSeekMath, 2402.03300."""
    return [_centred(g.rewards) / (_std(g.rewards) + STD_EPSILON) for g in groups]


def centred_advantages(groups: Sequence[Group]) -> list[Array]:
    """Return R − mean of its group: no bias towards questions of small variance. Dr. GRPO, 2503.20783."""
    return [_centred(g.rewards) for g in groups]


def batch_advantages(groups: Sequence[Group]) -> list[Array]:
    """Return (R − mean of its group) / (std of all rewards of the update + 1e-4). TRL's `scale_rewards="batch"`."""
    std = _std(np.concatenate([np.zeros(0), *(g.rewards for g in groups)]))
    return [_centred(g.rewards) / (std + STD_EPSILON) for g in groups]


def rloo_advantages(groups: Sequence[Group]) -> list[Array]:
    """Return R_i − mean of the others in the group, which is n / (n − 1) · (R_i − mean of all). RLOO, 2402.14740."""
    return [_centred(g.rewards) * (len(g.rewards) / max(len(g.rewards) - 1, 1)) for g in groups]


def gdpo_advantages(groups: Sequence[Group]) -> list[Array]:
    """Normalise each function in its group, then their weighted sum over the whole update. GDPO, 2601.05242.

    So two rewards of different scale both count. A sum that is normalised afterwards hides the smaller one.
    """
    sums = [_sum_of_normalised(g) for g in groups]
    # Their mean is 0: that of each function is, in each group.
    std = _std(np.concatenate([np.zeros(0), *sums]))
    return [s / (std + STD_EPSILON) for s in sums]


ADVANTAGES: dict[str, Callable[[Sequence[Group]], list[Array]]] = {
    "group": group_advantages,
    "none": centred_advantages,
    "batch": batch_advantages,
    "rloo": rloo_advantages,
    "gdpo": gdpo_advantages,
}


def _centred(x: Array) -> Array:
    """Return deviations from the mean; exactly 0 if the values differ only by rounding."""
    if not x.size or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return np.zeros_like(x)
    return np.asarray(x - x.mean())


def _std(x: Array) -> float:
    """Return the sample standard deviation; 0 for fewer than two values."""
    return float(np.std(x, ddof=1)) if x.size > 1 else 0.0


def _sum_of_normalised(group: Group) -> Array:
    total = np.zeros(len(group.rewards))
    for rewards, weight in zip(group.by_function.T, group.weights, strict=True):
        given = ~np.isnan(rewards)
        total[given] += weight * _centred(rewards[given]) / (_std(rewards[given]) + STD_EPSILON)
    return total


def _checked(rewards: Array, weights: Array) -> Array:
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or weights.ndim != 1 or rewards.shape[1] != weights.size:
        raise ValueError(f"rewards must be [G, K] with K = {weights.size} weights, got {rewards.shape}")
    return np.where(np.abs(rewards) <= REWARD_LIMIT, rewards, np.nan)


def _with_penalty(rewards: Array, penalty: Array, valid: Array) -> Array:
    penalty = np.asarray(penalty, np.float64)
    if penalty.shape != valid.shape:
        raise ValueError(f"a penalty must be [G] = {valid.shape}, got {penalty.shape}")
    return np.column_stack([rewards, penalty])


def _scattered(values: Array, totals: Array, valid: Array) -> Advantages:
    advantages = np.zeros(valid.shape, np.float32)
    advantages[valid] = values
    return Advantages(advantages, valid, np.where(valid, totals, np.nan))
