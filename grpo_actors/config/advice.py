"""Find settings that are allowed but have no effect, or are probably mistakes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_actors.config.objective import LOSSES

if TYPE_CHECKING:
    from grpo_actors.config.objective import ObjectiveConfig
    from grpo_actors.config.schema import Config


def advice(config: "Config") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, remark) for settings that have no effect or are probably mistakes.

    The caller shows a remark only if the user set the key.
    """
    yield from ((key, f"has no effect: {reason}") for key, reason in without_effect(config).items())
    objective = config.objective
    clips = {"clip_eps", "clip_eps_high"} <= LOSSES[objective.loss].reads
    if clips and objective.clip_eps_high is not None and objective.clip_eps_high < objective.clip_eps:
        reason = "good completions are clipped earlier than bad ones"
        yield (
            "objective.clip_eps_high",
            f"= {objective.clip_eps_high} lies below clip_eps = {objective.clip_eps}: {reason}",
        )
    if config.rollout.fewer_bits and objective.ratio == "recorded":
        reason = "the quantised policy of the workers differs from the learner's, so ratios do not start at 1"
        yield "objective.ratio", f'= "recorded": {reason}'


def without_effect(config: "Config") -> dict[str, str]:
    """Return the dotted keys of the settings that nothing reads with these others, each with the reason."""
    parts = (
        _unused_in_model,
        _unused_in_selection,
        _unused_in_objective,
        _unused_in_processes,
        _unused_in_data,
    )
    return {key: reason for part in parts for key, reason in part(config)}


def _unused_in_model(config: "Config") -> Iterator[tuple[str, str]]:
    if config.model.fine_tune_type == "full":
        for leaf in ("rank", "scale", "dropout", "layers", "keys"):
            yield f"model.lora_{leaf}", 'fine_tune_type is "full"'
    if not config.rollout.quantize_for_rollouts:
        yield "rollout.rollout_bits", "quantize_for_rollouts is false"
    elif config.model.base_bits:
        yield "rollout.quantize_for_rollouts", "base_bits has quantised the model already"
    if config.learner.optimizer in {"lion", "adafactor"}:
        for leaf in ("adam_beta1", "adam_beta2"):
            yield f"learner.{leaf}", f'optimizer is "{config.learner.optimizer}"'


def _unused_in_selection(config: "Config") -> Iterator[tuple[str, str]]:
    selection = config.selection
    if not selection.replaces_groups:
        for leaf in ("refill_limit", "oversampling"):
            yield f"selection.{leaf}", "no group is ever replaced"
    if not selection.curriculum:
        yield "selection.curriculum_floor", "curriculum is false"


def _unused_in_objective(config: "Config") -> Iterator[tuple[str, str]]:
    objective = config.objective
    for number in frozenset().union(*(loss.reads for loss in LOSSES.values())) - _numbers_read(objective):
        yield f"objective.{number}", f'loss is "{objective.loss}"'
    if objective.kl_coeff == 0:
        for leaf in ("kl_estimator", "reference_refresh_updates", "reference_refresh_alpha"):
            yield f"objective.{leaf}", "kl_coeff is 0"
        yield "health.max_kl", "kl_coeff is 0: no KL is measured"
    elif objective.reference_refresh_updates == 0:
        yield "objective.reference_refresh_alpha", "reference_refresh_updates is 0"
    if objective.correction == "none":
        yield "objective.correction_cap", 'correction is "none"'
    if not objective.correction.endswith("_mask"):
        yield "objective.correction_floor", f'correction is "{objective.correction}"'


def _numbers_read(objective: "ObjectiveConfig") -> frozenset[str]:
    """Return the numbers that the loss reads, and those from which numbers that are not set are derived."""
    read = LOSSES[objective.loss].reads
    if "cispo_cap" in read and objective.cispo_cap is None:
        read |= {"clip_eps_high"}
    if "clip_eps_high" in read and objective.clip_eps_high is None:
        read |= {"clip_eps"}
    return read


def _unused_in_processes(config: "Config") -> Iterator[tuple[str, str]]:
    if config.transport.scheme == "ipc":
        for leaf in ("host", "port", "keys_dir", "insecure", "events_text"):
            yield f"transport.{leaf}", 'scheme is "ipc"'
    if config.learner.ranks == 1:
        yield "learner.divide_model", "ranks is 1"
        yield "learner.divide_gradient", "ranks is 1"
    if config.rollout.workers == 0:
        yield "rollout.rollout_devices", "workers is 0: the learner's process samples"
    if not config.evaluator.eval_every_updates:
        yield "evaluator.evaluator_device", "eval_every_updates is 0: there is no evaluator"
    if not config.evaluator.eval_sampled:
        yield "evaluator.eval_temperature", "eval_sampled is false"


def _unused_in_data(config: "Config") -> Iterator[tuple[str, str]]:
    if config.data.task != "dataset":
        for leaf in (
            *("subset", "split", "eval_split", "revision", "prompt_column", "answer_column"),
            "eval_fraction",
        ):
            yield f"data.{leaf}", f'task is "{config.data.task}"'
    elif config.data.eval_path or config.data.eval_split:
        yield "data.eval_fraction", "eval_path or eval_split is given"
    if config.data.task != "reasoning_gym":
        for leaf in ("task", "settings", "size", "eval_size"):
            yield f"data.gym_{leaf}", f'task is "{config.data.task}"'
    if "code_tests" not in config.reward.functions:
        for leaf in ("allow_code_execution", "code_timeout_s", "code_memory_gb"):
            yield f"reward.{leaf}", "reward.functions has no code_tests"
