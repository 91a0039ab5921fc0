"""Find settings that are valid alone but contradict each other, each with the reason and the cure.

Does not know where settings come from: it names the keys involved, and `load` finds their sources.
"""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from grpo_actors.config.objective import LOSSES
from grpo_actors.score import ACCURACY, REWARD

if TYPE_CHECKING:
    from grpo_actors.config.data import DataConfig
    from grpo_actors.config.schema import Config


#: Arguments of transformers' `apply_chat_template` that are not variables of a template.
TEMPLATE_ARGUMENTS = frozenset(
    {
        *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One broken rule. `keys[0]` is the setting that the message is about; the others are involved."""

    keys: tuple[str, ...]
    rule: str
    value: Any


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
    yield from _check_model(config)
    yield from _check_divided_learner(config)
    yield from _check_objective(config)
    yield from _check_selection(config)
    if not config.data.sources:
        yield from _check_data(config.data)
    yield from _check_sources(config)
    yield from _check_rewards(config)
    yield from _check_thinking(config)
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
    yield from divided_worker(config, rollout.rollout_ranks)
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


def divided_worker(config: "Config", ranks: int) -> Iterator[Contradiction]:
    """Yield the rules that a worker breaks whose model is divided among so many ranks."""
    rollout, key = config.rollout, "rollout.rollout_ranks"
    if ranks == 1:
        return
    if rollout.workers == 0:
        yield Contradiction(
            (key, "rollout.workers"),
            "must be 1 when workers is 0 (the learner samples with its own model, which is whole)",
            ranks,
        )
    if rollout.quantize_for_rollouts:
        yield Contradiction(
            (key, "rollout.quantize_for_rollouts"),
            "must be 1 with quantize_for_rollouts (parts of a model cannot be quantised; model.base_bits = 4 can)",
            ranks,
        )
    if config.model.fine_tune_type == "dora":
        yield Contradiction(
            (key, "model.fine_tune_type"),
            'must be 1 when fine_tune_type is "dora" (a norm of DoRA needs whole rows; "lora" does not)',
            ranks,
        )


def _check_divided_learner(config: "Config") -> Iterator[Contradiction]:
    key = "learner.divide_model"
    if not config.learner.divide_model:
        return
    if config.model.fine_tune_type != "lora":
        yield Contradiction(
            (key, "model.fine_tune_type"),
            'needs fine_tune_type = "lora" (only frozen weights are divided)',
            True,
        )
    if config.model.lora_dropout:
        yield Contradiction(
            (key, "model.lora_dropout"), "needs lora_dropout = 0 (each rank would drop other inputs)", True
        )
    if config.rollout.workers == 0:
        yield Contradiction(
            (key, "rollout.workers"),
            "needs rollout.workers of at least 1 (with 0 the learner's first rank would sample without the others)",
            True,
        )


def _check_model(config: "Config") -> Iterator[Contradiction]:
    if config.model.lora_layers == 0:
        yield Contradiction(
            ("model.lora_layers",),
            "must be -1 (all layers) or at least 1 (an adapter on none learns nothing)",
            0,
        )
    if config.model.base_bits and config.model.fine_tune_type == "full":
        yield Contradiction(
            ("model.base_bits", "model.fine_tune_type"),
            'must be 0 when fine_tune_type is "full" (quantised weights cannot be trained; "lora" trains beside them)',
            config.model.base_bits,
        )
    if config.learner.optimizer == "adam" and config.learner.weight_decay:
        yield Contradiction(
            ("learner.weight_decay", "learner.optimizer"),
            'must be 0 when optimizer is "adam" (Adam with a decoupled decay is "adamw")',
            config.learner.weight_decay,
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


def _check_sources(config: "Config") -> Iterator[Contradiction]:
    weights, names = config.reward.functions, [source.name for source in config.all_sources]
    for key, sources in (
        ("data.sources", config.data.sources),
        ("evaluator.eval_sources", config.evaluator.eval_sources),
    ):
        for source in sources:
            if names.count(source.name) > 1:
                yield Contradiction((key,), "must have another name for each source", source.name)
            if unknown := [name for name in source.rewards if name not in weights]:
                yield Contradiction(
                    (key, "reward.functions"),
                    f"must name rewards of reward.functions ({', '.join(weights)}) in {source.name}",
                    unknown[0],
                )
            for broken in _check_data(config.data.of(source)):
                yield Contradiction((key,), f"{source.name}: {broken.keys[0]} {broken.rule}", broken.value)
    if config.data.sources and not weights:
        yield Contradiction(
            ("reward.functions", "data.sources"),
            "must name the rewards of a mixture (each source may choose some of them)",
            weights,
        )
    weighted = [source.weight is not None for source in config.data.sources]
    if any(weighted) and not all(weighted):
        yield Contradiction(
            ("data.sources",),
            "must have a weight for every source or for none",
            next(source.name for source in config.data.sources if source.weight is None),
        )
    for source in config.evaluator.eval_sources:
        if source.weight is not None:
            yield Contradiction(
                ("evaluator.eval_sources",),
                f"must have no weight ({source.name}): all count alike",
                source.weight,
            )


def _check_data(data: "DataConfig") -> Iterator[Contradiction]:
    """Yield the broken rules of one data set."""
    if data.task == "dataset" and not data.path:
        yield Contradiction(
            ("data.path", "data.task"),
            'must name a file, folder, function or hub id when task is "dataset"',
            "",
        )
    if data.task in ("arithmetic", "reasoning_gym") and (data.path or data.eval_path):
        yield Contradiction(
            ("data.path" if data.path else "data.eval_path", "data.task"),
            f'must be empty when task is "{data.task}", which makes its own problems (task = "dataset" reads a file)',
            data.path or data.eval_path,
        )
    if data.task == "reasoning_gym" and not data.gym_task:
        yield Contradiction(
            ("data.gym_task", "data.task"),
            'must name one of the library\'s tasks, such as chain_sum, when task is "reasoning_gym"',
            "",
        )
    if data.num_shots and data.task != "gsm8k":
        yield Contradiction(
            ("data.num_shots", "data.task"),
            f'must be 0 when task is "{data.task}", which has no worked examples (a prompt may be a chat with its own)',
            data.num_shots,
        )


def _check_rewards(config: "Config") -> Iterator[Contradiction]:
    data, weights = config.data, config.reward.functions
    if "reasoning_gym" in weights and not data.sources and data.task != "reasoning_gym":
        yield Contradiction(
            ("reward.functions", "data.task"),
            f'must not have reasoning_gym when task is "{data.task}", whose problems that library cannot score',
            weights,
        )
    if "code_tests" in weights and not config.reward.allow_code_execution:
        yield Contradiction(
            ("reward.functions", "reward.allow_code_execution"),
            "must not have code_tests, which runs code that the model wrote, unless reward.allow_code_execution = true "
            "(docs/howto/code-tests.md says what that does not protect from)",
            weights,
        )
    metric = config.evaluator.metric
    if weights and metric not in (None, ACCURACY, REWARD, *weights):
        yield Contradiction(
            ("evaluator.metric", "reward.functions"),
            f"must be one of {', '.join((ACCURACY, REWARD, *weights))}",
            metric,
        )
    if weights and not any(weights.values()):
        yield Contradiction(
            ("reward.functions",),
            "must have a weight other than 0 (else every completion is worth the same)",
            weights,
        )


def _check_thinking(config: "Config") -> Iterator[Contradiction]:
    settings, rollout = config.data.chat_template_kwargs, config.rollout
    if taken := sorted(TEMPLATE_ARGUMENTS & settings.keys()):
        yield Contradiction(
            ("data.chat_template_kwargs",),
            f"must not have {', '.join(taken)} (set by the trainer, not a variable of the template)",
            settings,
        )
    if rollout.think_tokens >= rollout.max_new_tokens:
        yield Contradiction(
            ("rollout.think_tokens", "rollout.max_new_tokens"),
            f"must be less than max_new_tokens = {rollout.max_new_tokens} (the answer needs tokens too)",
            rollout.think_tokens,
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
