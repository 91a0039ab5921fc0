"""Find settings that are valid alone but contradict each other, each with the reason and the cure.

Does not know where settings come from: it names the keys involved, and `load` finds their sources.
"""

import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from grpo_actors.config.contradiction import Contradiction
from grpo_actors.config.model_rules import check_model
from grpo_actors.config.objective import LOSSES
from grpo_actors.config.task_rules import check_tasks

if TYPE_CHECKING:
    from grpo_actors.config.schema import Config


def check(config: "Config") -> None:
    """Raise on the first contradiction.

    Raises:
        PydanticCustomError: Type ``contradiction``; its context has the fields of a `Contradiction`.
    """
    for broken in contradictions(config):
        raise PydanticCustomError(
            "contradiction",
            "{key} {rule}, got {value}",
            {"key": broken.keys[0], "keys": broken.keys, "rule": broken.rule, "value": broken.value},
        )


def contradictions(config: "Config") -> Iterator[Contradiction]:
    """Yield all broken rules of a configuration whose single values are in bounds."""
    yield from _check_groups(config)
    yield from check_model(config)
    yield from _check_objective(config)
    yield from _check_selection(config)
    yield from check_tasks(config)
    yield from _check_trackers(config)


def _check_groups(config: "Config") -> Iterator[Contradiction]:
    rollout, groups = config.rollout, config.groups_per_update
    # Even without the division by the deviation, a group of one has reward - mean = 0: no signal.
    if rollout.num_generations < 2:
        yield Contradiction(
            ("rollout.num_generations", "objective.advantage"),
            "must be at least 2 (a group of one has no baseline)",
            rollout.num_generations,
        )
    if groups % rollout.batch_groups:
        divisors = [str(d) for d in range(1, groups + 1) if groups % d == 0]
        yield Contradiction(
            ("rollout.batch_groups", "learner.batch_size", "learner.gradient_accumulation_steps"),
            f"must divide the {groups} groups of an update (batch_size × gradient_accumulation_steps), "
            f"so one of {', '.join(divisors)}",
            rollout.batch_groups,
        )
    if rollout.quantize_for_rollouts and rollout.workers == 0:
        yield Contradiction(
            ("rollout.quantize_for_rollouts", "rollout.workers"),
            "needs rollout.workers of at least 1 (with 0 the learner samples with the weights it trains)",
            True,
        )
    if len(rollout.rollout_devices) % rollout.rollout_ranks:
        yield Contradiction(
            ("rollout.rollout_devices", "rollout.rollout_ranks"),
            f"must name rollout_ranks = {rollout.rollout_ranks} devices for each worker",
            list(rollout.rollout_devices),
        )
    if rollout.in_flight_updates and rollout.workers == 0:
        yield Contradiction(
            ("rollout.in_flight_updates", "rollout.workers"),
            "needs rollout.workers of at least 1 (with 0 nothing is sampled while the learner updates)",
            True,
        )
    if rollout.in_flight_updates and rollout.max_staleness == 0:
        yield Contradiction(
            ("rollout.in_flight_updates", "rollout.max_staleness"),
            "needs rollout.max_staleness of at least 1 (with 0 nothing is being sampled when new weights come)",
            True,
        )


def _check_objective(config: "Config") -> Iterator[Contradiction]:
    objective, numbers = config.objective, config.objective.numbers
    high, bound = 1.0 + numbers["clip_eps_high"], LOSSES[objective.loss].second_bound
    if bound is not None and numbers[bound] <= high:
        yield Contradiction(
            (f"objective.{bound}", "objective.clip_eps_high", "objective.clip_eps", "objective.loss"),
            f"must be > 1 + clip_eps_high = {high:g} (below it the first clip has already acted)",
            numbers[bound],
        )
    if objective.correction != "none" and objective.ratio == "recorded":
        yield Contradiction(
            ("objective.correction", "objective.ratio"),
            'must be "none" when ratio is "recorded", which is already against the worker (ratio = "recomputed" is not)',
            objective.correction,
        )
    if objective.loss == "cispo" and objective.correction.startswith("sequence_"):
        yield Contradiction(
            ("objective.correction", "objective.loss"),
            "must be a token's when loss is \"cispo\", which bounds each token's weight so that all keep a gradient; "
            "one weight of the whole completion takes it away again",
            objective.correction,
        )
    if objective.overlong_tokens > config.rollout.max_new_tokens:
        yield Contradiction(
            ("objective.overlong_tokens", "rollout.max_new_tokens"),
            f"must be at most max_new_tokens = {config.rollout.max_new_tokens}",
            objective.overlong_tokens,
        )


def _check_selection(config: "Config") -> Iterator[Contradiction]:
    selection = config.selection
    if selection.min_success > selection.max_success:
        yield Contradiction(
            ("selection.min_success", "selection.max_success"),
            f"must be at most max_success = {selection.max_success:g} (else every group is replaced)",
            selection.min_success,
        )


def is_loopback(host: str) -> bool:
    """Return whether only this host can reach the address. A name other than localhost may resolve to any address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_trackers(config: "Config") -> Iterator[Contradiction]:
    metrics = config.metrics
    if metrics.trackers and not metrics.log_jsonl:
        yield Contradiction(
            ("metrics.trackers", "metrics.log_jsonl"),
            "needs metrics.log_jsonl = true (the trackers read what it writes)",
            list(metrics.trackers),
        )
    if len(set(metrics.trackers)) < len(metrics.trackers):
        yield Contradiction(("metrics.trackers",), "must name each tracker once", list(metrics.trackers))
