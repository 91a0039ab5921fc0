"""Settings that are fine alone and contradict each other, each with its reason and the way out.

Knows no file: it names the keys involved, and `load` finds out where they were set.
"""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from grpo_actors.config.schema import Config


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One broken rule. `keys[0]` is the setting to blame, the others take part."""

    keys: tuple[str, ...]
    rule: str
    value: Any


def check(config: "Config") -> None:
    """Refuse the first contradiction.

    Raises:
        PydanticCustomError: type ``contradiction``; its context is a `Contradiction`'s fields.
    """
    for broken in contradictions(config):
        raise PydanticCustomError(
            "contradiction",
            "{key} {rule}, got {value}",
            {"key": broken.keys[0], "keys": broken.keys, "rule": broken.rule, "value": broken.value},
        )


def contradictions(config: "Config") -> Iterator[Contradiction]:
    """All broken rules of a configuration whose single values are in bounds."""
    yield from _of_groups(config)
    yield from _of_model(config)
    yield from _of_task(config)
    yield from _of_transport(config)


def _of_groups(config: "Config") -> Iterator[Contradiction]:
    rollout, groups = config.rollout, config.groups_per_update
    # Without the division by the deviation a group of one still has reward - mean = 0: no signal either.
    if rollout.num_generations < 2:
        yield Contradiction(
            ("rollout.num_generations", "learner.advantage"),
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


def _of_model(config: "Config") -> Iterator[Contradiction]:
    if config.model.lora_layers == 0:
        yield Contradiction(
            ("model.lora_layers",),
            "must be -1 (all layers) or at least 1 (an adapter on none learns nothing)",
            0,
        )


def _of_task(config: "Config") -> Iterator[Contradiction]:
    data, weights = config.data, config.reward.functions
    if data.task == "jsonl" and not data.path:
        yield Contradiction(("data.path", "data.task"), 'must name a .jsonl file when task is "jsonl"', "")
    if data.task == "arithmetic" and (data.path or data.eval_path):
        yield Contradiction(
            ("data.path" if data.path else "data.eval_path", "data.task"),
            'must be empty when task is "arithmetic", which makes its own problems (task = "jsonl" reads a file)',
            data.path or data.eval_path,
        )
    if data.num_shots and data.task != "gsm8k":
        yield Contradiction(
            ("data.num_shots", "data.task"),
            f'must be 0 when task is "{data.task}", which has no worked examples (a jsonl prompt may be a chat with its own)',
            data.num_shots,
        )
    if weights and not any(weights.values()):
        yield Contradiction(
            ("reward.functions",),
            "must have a weight other than 0 (else every completion is worth the same)",
            weights,
        )


def _of_transport(config: "Config") -> Iterator[Contradiction]:
    transport = config.transport
    if transport.scheme == "tcp" and not transport.insecure and not _is_loopback(transport.host):
        yield Contradiction(
            ("transport.host", "transport.scheme", "transport.insecure"),
            "must be 127.0.0.1: beyond this host the sockets are neither encrypted nor authenticated. Either forward "
            "the three ports (ssh -L) to 127.0.0.1, or set transport.insecure = true on a network you trust",
            transport.host,
        )


def _is_loopback(host: str) -> bool:
    """Whether only this host reaches the address. A name other than localhost may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def advice(config: "Config") -> Iterator[tuple[str, str]]:
    """Dotted key and remark: settings that are allowed but do nothing here, or are probably slips.

    The caller shows a remark only where the user set the key.
    """
    yield from ((key, f"has no effect: {reason}") for key, reason in _without_effect(config))
    learner = config.learner
    if learner.clip_eps_high is not None and learner.clip_eps_high < learner.clip_eps:
        reason = "good completions are clipped earlier than bad ones"
        yield (
            "learner.clip_eps_high",
            f"= {learner.clip_eps_high} lies below clip_eps = {learner.clip_eps}: {reason}",
        )


def _without_effect(config: "Config") -> Iterator[tuple[str, str]]:
    if config.model.fine_tune_type == "full":
        for leaf in ("rank", "scale", "dropout", "layers", "keys"):
            yield f"model.lora_{leaf}", 'fine_tune_type is "full"'
    if config.transport.scheme == "ipc":
        for leaf in ("host", "port", "insecure"):
            yield f"transport.{leaf}", 'scheme is "ipc"'
    if config.data.task != "jsonl":
        for leaf in ("prompt_column", "answer_column", "eval_fraction"):
            yield f"data.{leaf}", f'task is "{config.data.task}"'
    elif config.data.eval_path:
        yield "data.eval_fraction", "eval_path is given"
    if not config.evaluator.eval_sampled:
        yield "evaluator.eval_temperature", "eval_sampled is false"
