"""Decide whether a run can be resumed under other settings."""

from typing import Any

from grpo_actors.config.schema import OWNER, Config

#: Settings that change the order of the data, the model or the optimizer's state: a checkpoint written
#: under one value is not valid under another. All others, such as learning_rate, max_updates, workers or
#: logging_steps, may change between a run and its resumption.
MATTERS_FOR_RESUME = frozenset(
    {
        "run.seed",
        "model.model_name",
        "model.dtype",
        "model.fine_tune_type",
        "model.base_bits",
        "model.lora_rank",
        "model.lora_scale",
        "model.lora_layers",
        "model.lora_keys",
        "model.adapter_path",
        "data.task",
        "data.subset",
        "data.split",
        "data.eval_split",
        "data.revision",
        "data.eval_fraction",
        "data.prompt_column",
        "data.answer_column",
        "data.gym_task",
        "data.gym_settings",
        "data.gym_size",
        "data.gym_eval_size",  # problems that are held out are not trained on
        "data.system_prompt",
        "data.chat_template",
        "data.chat_template_kwargs",
        "data.num_shots",
        "data.sources",
        "data.max_train_samples",
        "data.max_prompt_length",
        "data.shuffle",
        "rollout.num_generations",
        "learner.batch_size",
        "learner.gradient_accumulation_steps",
        "learner.num_iterations",
        "learner.optimizer",
    }
)


#: Settings that say where the data is. Its content is compared instead (`rundir.data`), so it may move.
_PLACES = frozenset({"path", "eval_path"})


def differences(a: Config, b: Config) -> list[str]:
    """Return the dotted keys whose values differ, in the order of the schema."""
    return [
        f"{section}.{leaf}"
        for leaf, section in OWNER.items()
        if getattr(getattr(a, section), leaf) != getattr(getattr(b, section), leaf)
    ]


def resume_conflicts(saved: Config, wanted: Config) -> list[str]:
    """Return the differences that prevent `saved` from continuing under `wanted`; empty if it may continue.

    An update may be cut into micro-batches in another way (to fit in memory) if its number of groups stays the same.
    """
    conflicts = [key for key in differences(saved, wanted) if key in MATTERS_FOR_RESUME]
    if _without_places(saved) == _without_places(wanted):
        conflicts = [key for key in conflicts if key != "data.sources"]
    if saved.groups_per_update == wanted.groups_per_update:
        cut = {"learner.batch_size", "learner.gradient_accumulation_steps"}
        return [key for key in conflicts if key not in cut]
    return conflicts


def _without_places(config: Config) -> list[dict[str, Any]]:
    return [source.model_dump(exclude=set(_PLACES)) for source in config.data.sources]
