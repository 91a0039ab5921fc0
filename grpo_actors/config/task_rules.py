"""The rules of the problems and their rewards: data sets, mixtures, templates, reward functions."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_actors.config.contradiction import Contradiction
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


def check_tasks(config: "Config") -> Iterator[Contradiction]:
    """Yield the broken rules of problems and rewards."""
    if not config.data.sources:
        yield from _check_data(config.data)
    yield from _check_sources(config)
    yield from _check_rewards(config)
    yield from _check_thinking(config)


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
