"""The rules of the model: what may be trained of it, and how it may be divided among ranks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_actors.config.contradiction import Contradiction

if TYPE_CHECKING:
    from grpo_actors.config.schema import Config


def check_model(config: "Config") -> Iterator[Contradiction]:
    """Yield the broken rules of the model."""
    yield from _check_training(config)
    yield from divided_worker(config, config.rollout.rollout_ranks)
    yield from _check_divided_learner(config)


def _check_training(config: "Config") -> Iterator[Contradiction]:
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
    if config.learner.divide_gradient:
        yield Contradiction(
            (key, "learner.divide_gradient"),
            "needs divide_gradient = false (an adapter's gradient is small)",
            True,
        )
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
